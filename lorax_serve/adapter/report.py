"""What an adapter's files hold, said without tensors: for people, before or after a load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lorax_serve.adapter.config import LoRAConfig
from lorax_serve.adapter.expected import expected_tensors
from lorax_serve.adapter.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read
from lorax_serve.adapter.match import Match, match_tensors
from lorax_serve.adapter.modules import ModuleShape
from lorax_serve.adapter.probe import Probe
from lorax_serve.adapter.tensors import Role
from lorax_serve.errors import AdapterRejected
from lorax_serve.report import LoadReport, ModuleReport, ProbeOutcome, ProbeReport

__all__ = ["inspect", "refusal", "report_of"]


def inspect(directory: str | os.PathLike[str], modules: Mapping[str, ModuleShape]) -> LoadReport:
    """What a load of an adapter directory would find, as far as its files tell.

    A bad adapter is a report too. The golden probe is read, but not computed: that takes the base
    model's weights.

    Args:
        directory: with the adapter's two files.
        modules: every module of the base model that adapters can change, by full path.
    """
    try:
        files = read(directory)
        probe = Probe.from_metadata(files.metadata)
    except AdapterRejected as error:
        return refusal(error, directory)
    match = match_tensors(files.config, files.tensors, modules, probed=probe is not None)
    if probe is not None and files.config.changes_base:
        match.warnings.append(
            f"init_lora_weights={files.config.init_lora_weights!r} changes the base weights: a "
            "server applies it only if its probe passes"
        )
    return report_of(directory, files, match, modules, probe)


def refusal(error: AdapterRejected, directory: str | os.PathLike[str]) -> LoadReport:
    """The report of files that could not be read, or whose config is refused."""
    empty = LoadReport(file_bytes=_file_bytes(directory))
    return empty.refused(error.reason, str(error))


def report_of(
    directory: str | os.PathLike[str],
    files: AdapterFiles,
    match: Match,
    modules: Mapping[str, ModuleShape],
    probe: Probe | None,
) -> LoadReport:
    """The report of files that were matched with a base model.

    Args:
        directory: where ``files`` were read.
        files: the adapter's.
        match: of ``files`` with ``modules``.
        modules: the base model's.
        probe: the adapter's, not computed yet; None if it has none.
    """
    changed = _modules(files.config, modules)
    report = LoadReport(
        digest=files.digest,
        base_model=files.config.base_model_name_or_path or "",
        variants=_variants(files.config),
        modules=changed,
        matched=tuple(match.matched),
        unmatched=tuple(match.unmatched),
        missing=tuple(match.missing),
        num_modules=len(changed),
        num_matched=len(match.matched),
        num_unmatched=len(match.unmatched),
        num_missing=len(match.missing),
        file_bytes=_file_bytes(directory),
        warnings=tuple(match.warnings),
        probe=ProbeReport(
            ProbeOutcome.NONE if probe is None else ProbeOutcome.UNCHECKED,
            effect=0.0 if probe is None else probe.effect,
        ),
    )
    for problem in match.problems:
        report = report.refused(problem.reason, str(problem))
    return report


def _modules(config: LoRAConfig, modules: Mapping[str, ModuleShape]) -> tuple[ModuleReport, ...]:
    try:
        wanted = expected_tensors(config, modules)
    except AdapterRejected:  # which is one of the match's problems
        return ()
    with_lora = {key.path for key in wanted if key.role in (Role.A, Role.EMBEDDING_A)}
    changed = {key.path for key in wanted}
    return tuple(
        ModuleReport(
            path,
            shape.kind.value,
            config.rank_for(path),
            config.alpha_for(path),
            config.scale_for(path),
        )
        if path in with_lora
        else ModuleReport(path, shape.kind.value)
        for path, shape in modules.items()
        if path in changed
    )


def _variants(config: LoRAConfig) -> tuple[str, ...]:
    words = {
        "lora": not config.use_dora,
        "dora": config.use_dora,
        "rslora": config.use_rslora,
        "lora_bias": config.lora_bias,
        "trained biases": config.bias != "none",
        "modules_to_save": config.modules_to_save,
        "trained tokens": config.trainable_token_indices,
        "alora": config.alora_invocation_tokens,
    }
    return tuple(word for word, there in words.items() if there)


def _file_bytes(directory: str | os.PathLike[str]) -> int:
    total = 0
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with suppress(OSError):
            total += (Path(directory) / name).stat().st_size
    return total
