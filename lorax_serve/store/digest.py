"""The identity of an adapter's content: the names of its two files, and the digest over both."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "digest_of", "digest_of_bytes", "is_digest"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(directory: str | os.PathLike[str]) -> str:
    """``digest_of_bytes`` of the two files in ``directory``, in constant memory, without the GIL.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    root = Path(directory)
    with (root / CONFIG_FILE).open("rb", buffering=0) as file:
        config = hashlib.file_digest(file, "sha256").digest()
    with (root / WEIGHTS_FILE).open("rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(config)).hexdigest()


def digest_of_bytes(config: bytes, weights: bytes) -> str:
    """SHA-256 (64 hex digits) over the config's SHA-256 and the weights.

    The config goes in as a hash, so that no byte can move from one file to the other unnoticed.
    """
    digest = hashlib.sha256(hashlib.sha256(config).digest())
    digest.update(weights)
    return digest.hexdigest()


def is_digest(text: str) -> bool:
    """Whether ``text`` has a digest's form: so it is safe as a name of a file."""
    return _DIGEST.fullmatch(text) is not None
