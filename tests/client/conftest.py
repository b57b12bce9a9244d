from __future__ import annotations

from tests.server.conftest import harness, tokenizer_dir

__all__ = ["harness", "tokenizer_dir"]
