"""What the tests of sources share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sources.accounts import forget_accounts


@pytest.fixture(autouse=True)
def _no_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_accounts(monkeypatch, tmp_path)
