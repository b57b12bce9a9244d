from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.frontend.toy_tokenizers import save_word_tokenizer
from tests.server.harness import Harness, serving


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_tokenizer(tmp_path_factory.mktemp("words"))


@pytest_asyncio.fixture
async def harness(tokenizer_dir: Path, tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(tokenizer_dir, tmp_path) as running:
        yield running
