"""The golden probe of an adapter that is being loaded, computed between two steps."""

from __future__ import annotations

import logging
from dataclasses import replace

from lorax_serve.adapter.probe import Probe, check
from lorax_serve.core import AdapterInfo
from lorax_serve.engine.adapter_loader import LoadFinished
from lorax_serve.errors import AdapterRejected, EngineFailed, RejectReason
from lorax_serve.model.runner import HostAdapter, ModelRunner
from lorax_serve.report import LoadReport, ProbeOutcome, ProbeReport

__all__ = ["Prober"]

log = logging.getLogger(__name__)


class Prober:
    """Asks adapters what they answered where they were trained. For the engine's thread.

    Args:
        runner: computes the answers.
        policy: ``refuse`` or ``warn``, see ``EngineConfig.probe``; with ``off`` no probes come.
    """

    def __init__(self, runner: ModelRunner, policy: str) -> None:
        self._runner = runner
        self._policy = policy

    def check(self, loaded: LoadFinished) -> AdapterInfo:
        """What is known of an adapter once its probe, if there is one, was computed.

        Raises:
            LoraxError: what the loading thread has found.
            AdapterRejected: the probe failed; with the report.
            EngineFailed: it could not be computed.
        """
        if loaded.error is not None:
            raise loaded.error
        info, probe, weights = loaded.info, loaded.probe, loaded.weights
        assert info is not None
        if probe is None:
            return info
        assert weights is not None
        try:
            found, warnings = self._ask(probe, weights, info, loaded.fingerprint)
        except Exception as error:  # out of memory, say
            log.exception("a probe failed")
            raise EngineFailed(
                f"the adapter's probe cannot be computed: {type(error).__name__}: {error}"
            ) from error
        report = replace(info.report, probe=found, warnings=(*info.report.warnings, *warnings))
        if found.outcome is ProbeOutcome.FAILED:
            report = self._failed(report)
        return replace(info, report=report)

    def _failed(self, report: LoadReport) -> LoadReport:
        message = f"the golden probe failed: {report.probe.message}"
        if self._policy == "warn":
            return replace(report, warnings=(*report.warnings, message))
        reason = RejectReason.PROBE_FAILED
        raise AdapterRejected(reason, message, report.refused(reason, message))

    def _ask(
        self, probe: Probe, weights: HostAdapter, info: AdapterInfo, fingerprint: str
    ) -> tuple[ProbeReport, tuple[str, ...]]:
        """The result, and warnings."""
        served = self._runner.info
        prompt, answers = probe.token_ids, [token for token, _ in probe.top]
        stranger = max(*prompt, *answers)
        refusal = ""
        if stranger >= served.vocab_size:
            refusal = (
                f"the base model has {served.vocab_size} tokens and the probe names token "
                f"{stranger}: it is not the one that the adapter was trained on"
            )
        elif len(prompt) > self._runner.max_length:
            refusal = (
                f"its prompt of {len(prompt)} tokens does not fit into max_sequence_length "
                f"{self._runner.max_length}; raise that"
            )
        if refusal:
            return ProbeReport(ProbeOutcome.FAILED, effect=probe.effect, message=refusal), ()
        start = info.start_in(prompt)
        result = check(
            probe,
            self._runner.logits_after(prompt, answers, weights, start),
            self._runner.logits_after(prompt, answers, None),
            fingerprint,
            served.dtype,
        )
        outcome = ProbeOutcome.PASSED if result.passed else ProbeOutcome.FAILED
        found = ProbeReport(
            outcome, result.difference, result.tolerance, result.effect, result.message
        )
        return found, result.warnings
