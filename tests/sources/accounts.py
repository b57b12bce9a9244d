"""An environment in which boto3 and huggingface_hub know nothing of this machine's accounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def forget_accounts(monkeypatch: pytest.MonkeyPatch, nowhere: Path) -> None:
    """Give them accounts of the test only.

    Args:
        monkeypatch: of the test.
        nowhere: a directory without their files.
    """
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOFTHETEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(nowhere / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nowhere / "no-credentials"))
    monkeypatch.setenv("HF_TOKEN", "hf_token-of-the-test")
