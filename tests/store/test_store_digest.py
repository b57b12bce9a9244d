"""The digest: the same of files and of bytes, the adapter leaf's, and no other content's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorax_serve import adapter
from lorax_serve.store.digest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    digest_of,
    digest_of_bytes,
    is_digest,
)


def test_what_it_covers(tmp_path: Path) -> None:
    config, weights = b'{"r": 1}', bytes(range(256)) * 5000
    (tmp_path / CONFIG_FILE).write_bytes(config)
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    expected = hashlib.sha256(hashlib.sha256(config).digest() + weights).hexdigest()
    assert digest_of(tmp_path) == digest_of_bytes(config, weights) == expected
    assert digest_of_bytes(config + weights[:1], weights[1:]) != expected


def test_the_adapter_leaf_has_the_same(make_adapter: Callable[..., Path]) -> None:
    directory = make_adapter("one", r=2, target_modules=["q_proj"])
    assert adapter.read(directory).digest == digest_of(directory)
    assert (adapter.CONFIG_FILE, adapter.WEIGHTS_FILE) == (CONFIG_FILE, WEIGHTS_FILE)


def test_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b"{}")
    with pytest.raises(FileNotFoundError, match=WEIGHTS_FILE):
        digest_of(tmp_path)


@pytest.mark.parametrize("text", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_what_is_no_digest(text: str) -> None:
    assert is_digest("a" * 64)
    assert not is_digest(text)


def test_the_store_needs_no_torch() -> None:
    code = "import sys, lorax_serve.store.recovery; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
