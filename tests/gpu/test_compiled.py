"""Kernels are compiled for the GPU that they are meant for, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="a-few"),
        pytest.param(["--all"], id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_for_an_h100(flags: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.gpu.compile_for_gpu", *flags]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, check=False, cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "_attend_splits" in done.stdout
