"""What the tests of all sources share: an adapter's bytes, and one way to fetch and to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorax_serve.errors import SourceFailed, SourceReason
from lorax_serve.sources import CONFIG_FILE, WEIGHTS_FILE, FetchLimits, Source

CONFIG = b'{"r": 4}'
WEIGHTS = bytes(range(256)) * 1200  # more than one chunk of any source over the network
ADAPTER = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}
SIZE = len(CONFIG) + len(WEIGHTS)
LIMITS = FetchLimits(max_bytes=SIZE, seconds=20.0)
HASTE = FetchLimits(max_bytes=SIZE, seconds=0.3)


def write_adapter(directory: Path, weights: bytes = WEIGHTS) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_bytes(CONFIG)
    (directory / WEIGHTS_FILE).write_bytes(weights)
    return directory


def fetched(source: Source, path: str, into: Path) -> tuple[dict[str, bytes], str]:
    """The files and the signature of a fetch."""
    into.mkdir()
    signature = source.fetch(path, into, LIMITS)
    return {file.name: file.read_bytes() for file in into.iterdir()}, signature


def failure(source: Source, path: str, into: Path, limits: FetchLimits = LIMITS) -> SourceFailed:
    """How a fetch fails; its message must name the source."""
    into.mkdir(exist_ok=True)
    with pytest.raises(SourceFailed) as caught:
        source.fetch(path, into, limits)
    assert str(caught.value).startswith(source.uri)
    assert str(caught.value).isprintable()
    assert caught.value.reason in SourceReason
    return caught.value
