"""Kernels are compiled for the GPU that they are meant for, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_for_an_h100(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.gpu.compile_for_gpu"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, check=False, cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
