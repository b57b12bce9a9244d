"""Specs by the content of the files they were read from: reading one takes all of transformers.

Importing what reads ``config.json`` takes seconds, at every start, for a few numbers that only
change with the file. They are kept beside the converted models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lorax_serve.checkpoint import architectures
from lorax_serve.checkpoint import spec as spec_module
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.source import cache_dir
from lorax_serve.checkpoint.spec import DecoderSpec, Layout

__all__ = ["load_spec"]

_FILES = ("config.json", "generation_config.json")


def load_spec(directory: Path) -> DecoderSpec:
    """``read_spec(directory)``, which is asked only the first time.

    Raises:
        ModelUnsupported: as ``read_spec``; refusals are not kept.
    """
    place = cache_dir() / "specs" / f"{_key(directory)}.json"
    try:
        return _from_json(place.read_text())
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not whole
        spec = read_spec(directory)
    with suppress(OSError):  # a cache that cannot be written costs time only
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as staged:
            staged.write(_to_json(spec))
        Path(staged.name).chmod(0o644)  # an image's cache is written and read by different users
        Path(staged.name).replace(place)
    return spec


def _key(directory: Path) -> str:
    """Of all that decides what is read: the files, and the code that reads them."""
    digest = hashlib.sha256(metadata.version("transformers").encode())
    code = (Path(spec_module.__file__), Path(architectures.__file__), Path(__file__))
    for path in (*code, *(directory / name for name in _FILES)):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _to_json(spec: DecoderSpec) -> str:
    return json.dumps(dataclasses.asdict(spec), default=torch.Tensor.tolist)


def _from_json(text: str) -> DecoderSpec:
    fields = json.loads(text)
    if fields["inv_freq"] is not None:
        fields["inv_freq"] = torch.tensor(fields["inv_freq"], dtype=torch.float32)
    for name in ("biased", "eos_token_ids"):
        fields[name] = tuple(fields[name])
    layout: dict[str, Any] = fields["layout"]
    tuples = {name: tuple(value) for name, value in layout.items() if isinstance(value, list)}
    fields["layout"] = Layout(**(layout | tuples))
    return DecoderSpec(**fields)
