"""The golden probe: a prompt, and the logits that a trained adapter gave after it.

``lorax-train`` stores one in the adapter's file; who loads the adapter computes the same logits and
compares. Another base, a wrong scale, tensors in the wrong places or an adapter that was not
converted are seen by what they answer. Plain numbers: how logits are computed is not known here.

Logits mean something only relative to each other, so what all tokens' differences have in common is
left out: the rounding of bfloat16 shifts all of them, and without it the rest is two thirds as
large. What remains does not grow with the 16 logits' own range, but with the deviation of all the
vocabulary's logits, which is therefore the unit (``scale``, 3 to 4 for SmolLM2). The worst
differences in it, on SmolLM2-135M, of 59 prompts with four adapters and without, between
transformers (rows) and this server's kernels (columns):

========  =============  ================  ==============  =================
.         torch float32  compiled float32  torch bfloat16  compiled bfloat16
========  =============  ================  ==============  =================
float32   0.00001        0.00003           0.17            0.10
bfloat16  0.15           0.15              0.23            0.16
========  =============  ================  ==============  =================

With bfloat16 the median is 0.03 to 0.06. On the prompts that suited them best, two adapters of 40
steps moved the logits by 3.4 to 5.1; there, twice or half their scale made a smaller difference,
0.8 to 2.3. So an effect above the tolerance is needed to see a wrong scale, but no guarantee.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = [
    "MAX_PROMPT",
    "MIN_PROMPT",
    "PROBE_KEY",
    "TOP",
    "Outcome",
    "Probe",
    "ProbeResult",
    "check",
]

PROBE_KEY = "lorax.probe"
MIN_PROMPT, MAX_PROMPT = 4, 32
TOP = 16
_VERSION = 1
_MAX_ID = 1 << 31
_MAX_LOGIT = 1e9
_FINGERPRINT = re.compile("[0-9a-f]{64}")
# In units of the scale, by what computes less exactly. float32 leaves room for other devices.
_TOLERANCE = {"float32": 0.02, "bfloat16": 0.4, "float16": 0.4}


@dataclass(frozen=True, slots=True)
class Probe:
    """What an adapter answered where it was trained."""

    token_ids: tuple[int, ...]
    """The prompt, 4 to 32 tokens, computed from position 0 with nothing before them."""
    top: tuple[tuple[int, float], ...]
    """The 16 most probable next tokens with the adapter (all, of a smaller vocabulary), and their
    logits."""
    base: tuple[float, ...]
    """The base model's logits of the same tokens."""
    scale: float
    """The standard deviation of the adapter's logits over the whole vocabulary."""
    base_fingerprint: str
    """``model.fingerprint.base_fingerprint`` of the base weights."""
    dtype: str
    """What both were computed in, such as ``float32``."""
    version: int = _VERSION
    """Of this format."""

    @property
    def effect(self) -> float:
        """The adapter's own part of the logits: their largest difference from the base's."""
        return _difference([logit for _, logit in self.top], self.base)

    @property
    def visibility(self) -> float:
        """``effect`` in units of ``scale``, to compare probes by."""
        return self.effect / self.scale

    def tolerance(self, dtype: str) -> float:
        """The largest difference that computing in ``dtype`` may make, as a logit."""
        return max(_TOLERANCE[self.dtype], _TOLERANCE[dtype]) * self.scale

    def to_metadata(self) -> dict[str, str]:
        """The one string for the header of the weights file."""
        return {PROBE_KEY: json.dumps(asdict(self), separators=(",", ":"))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Probe | None:
        """The probe in a weights file's header; None if there is none.

        Raises:
            AdapterRejected: when it is malformed (``bad_file``), or of a later version
                (``unsupported``).
        """
        text = metadata.get(PROBE_KEY)
        if text is None:
            return None
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _bad(f"not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise _bad(f"expected a JSON object, found {type(raw).__name__}")
        version: Any = raw.get("version")
        if _is_id(version) and version > _VERSION:
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"{PROBE_KEY} in the weights file's header has version {version}; {_VERSION} is "
                "the latest that is known here: a newer lorax-serve reads it",
            )
        return cls(**_checked(raw))


class Outcome(StrEnum):
    """What a check has found."""

    PASSED = "passed"
    WRONG_BASE = "wrong_base"
    """The base model alone answers differently."""
    WRONG_ADAPTER = "wrong_adapter"
    """The base model answers as it did; with the adapter it does not."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a check has found, and how clearly.

    Attributes:
        outcome: whether it passed, or why not.
        difference: the worst one, as a logit: of the base if that is wrong, else with the adapter.
        tolerance: what it was compared with.
        effect: ``Probe.effect``.
        message: one line for people that explains a failure; empty if it passed.
        warnings: one line each, of what was found besides, or could not be seen.
    """

    outcome: Outcome
    difference: float
    tolerance: float
    effect: float
    message: str
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the adapter answers as it did where it was trained."""
        return self.outcome is Outcome.PASSED


def check(
    probe: Probe,
    adapter_logits: Sequence[float],
    base_logits: Sequence[float],
    fingerprint: str,
    dtype: str,
) -> ProbeResult:
    """Compare what is served with what was trained.

    A base whose vocabulary lacks one of the probe's tokens is another one, and cannot be asked.

    Args:
        probe: from the adapter's file.
        adapter_logits: after ``probe.token_ids`` with the adapter, of the tokens of ``probe.top``.
        base_logits: of the same tokens without the adapter.
        fingerprint: of the base weights that are served.
        dtype: of the computation: ``float32``, ``bfloat16`` or ``float16``.
    """
    tolerance, effect = probe.tolerance(dtype), probe.effect
    of_base = _difference(base_logits, probe.base)
    of_adapter = _difference(adapter_logits, [logit for _, logit in probe.top])
    other = fingerprint != probe.base_fingerprint
    figures = f"tolerance {tolerance:.3g} ({dtype} here, {probe.dtype} where it was trained)"
    # Negated, because a NaN must not pass.
    if not of_base <= tolerance:
        weights = (
            "and its weights are others"
            if other
            else "though its weights seem to be the same: config.json (RoPE, norms) may differ"
        )
        message = (
            f"the base model is not the one that the adapter was trained on: its logits differ by "
            f"{of_base:.3g}, {figures}, {weights}"
        )
        return ProbeResult(Outcome.WRONG_BASE, of_base, tolerance, effect, message, ())
    warnings = []
    if other:
        warnings.append(
            "the base model's weights are not those that the adapter was trained on (fingerprint "
            f"{fingerprint[:12]}, not {probe.base_fingerprint[:12]}), though its logits are"
        )
    if effect <= tolerance:
        warnings.append(
            f"the adapter changes its probe's logits by {effect:.3g} only, {figures}: a wrong "
            "scale would not be seen"
        )
    if not of_adapter <= tolerance:
        message = (
            f"the adapter answers differently from the one that was trained: its logits differ by "
            f"{of_adapter:.3g}, {figures}, and the base model's by {of_base:.3g} only; "
            "adapter_config.json (lora_alpha, r) or the tensors were changed"
        )
        outcome = Outcome.WRONG_ADAPTER
        return ProbeResult(outcome, of_adapter, tolerance, effect, message, tuple(warnings))
    return ProbeResult(Outcome.PASSED, of_adapter, tolerance, effect, "", tuple(warnings))


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference, but for what all have in common; NaN if one is."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    common = sum(differences) / len(differences)
    # max() would lose a NaN, but then the mean is one, and so are all.
    return max(abs(difference - common) for difference in differences)


def _bad(message: str) -> AdapterRejected:
    return AdapterRejected(
        RejectReason.BAD_FILE, f"{PROBE_KEY} in the weights file's header: {message}"
    )


def _checked(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a probe from its parsed JSON."""
    fields = ("token_ids", "top", "base", "scale", "base_fingerprint", "dtype", "version")
    if wrong := sorted(raw.keys() ^ set(fields)):
        raise _bad(f"{wrong[0]} is {'unknown' if wrong[0] in raw else 'missing'}")
    tokens, top, base, scale, fingerprint, dtype, version = (raw[field] for field in fields)
    if not _is_list(tokens, _is_id, MIN_PROMPT, MAX_PROMPT):
        raise _bad(f"token_ids must be {MIN_PROMPT} to {MAX_PROMPT} token ids")
    if not _is_list(top, _is_pair, 2, TOP) or len({pair[0] for pair in top}) != len(top):
        raise _bad(f"top must be 2 to {TOP} pairs of a token id and its logit")
    if not _is_list(base, _is_logit, len(top), len(top)):
        raise _bad(f"base must be {len(top)} logits, as many as top has")
    if not (_is_logit(scale) and scale > 0):
        raise _bad(f"scale must be a number above 0, found {scale!r}")
    if not (isinstance(fingerprint, str) and _FINGERPRINT.fullmatch(fingerprint)):
        raise _bad(f"base_fingerprint must be a SHA-256 in hex, found {fingerprint!r}")
    if not (isinstance(dtype, str) and dtype in _TOLERANCE):
        raise _bad(f"dtype must be one of {', '.join(_TOLERANCE)}, found {dtype!r}")
    if not (_is_id(version) and version == _VERSION):
        raise _bad(f"version must be {_VERSION}, found {version!r}")
    pairs = tuple((token, float(logit)) for token, logit in top)
    logits = tuple(map(float, base))
    return raw | {"token_ids": tuple(tokens), "top": pairs, "base": logits, "scale": float(scale)}


def _is_list(value: object, of: Any, least: int, most: int) -> bool:
    return isinstance(value, list) and least <= len(value) <= most and all(map(of, value))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_ID


def _is_logit(value: object) -> bool:
    # The bound refuses NaN, infinity and whole numbers that no float can hold.
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_LOGIT
    )


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_id(value[0]) and _is_logit(value[1])
