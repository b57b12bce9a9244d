"""A disk that is really full (ENOSPC by the kernel, amid files) takes nothing away that was whole.

``test_train_checkpoints.py`` has each write of a save fail in turn, without a disk of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MOUNTED = [
    *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
    'mount -t tmpfs -o size=1m none "$0" && exec "$@"',
]
ROOMS = [0, 4096, 16384, 32768, 65536, 131072]


def on_a_small_disk(disk: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees, at ``disk``, a file system of 1 MiB, which ends with it."""
    disk.mkdir(exist_ok=True)
    return subprocess.run(
        [*MOUNTED, str(disk), *command], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare")
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint_and_no_more(
    llama: Path, write_rows: Callable[..., Path], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    if on_a_small_disk(disk, "true").returncode:
        pytest.skip("no file system can be mounted here")
    places = [str(disk), str(llama), str(write_rows(pairs)), str(tmp_path / "plain")]
    program = [sys.executable, "-m", "tests.train.filling"]
    done = on_a_small_disk(disk, *program, *places, *map(str, ROOMS))
    found = {each["room"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert list(found) == ROOMS, done.stderr
    for each in found.values():
        assert each["checkpoints"][-1] >= 4  # the last one before the disk was full
        assert each["adapter"] == ("old" if each["error"] else "8")
        if each["error"]:
            assert "No space left on device; an adapter that was there before is" in each["error"]
            assert "Make room or mend the disk, then run the command again" in each["error"]
        assert each["same"], "resumed, it is not what an undisturbed run leaves"
        assert each["left"] == ["step-6", "step-8"]
    assert found[0]["checkpoints"] == [2, 4]
    for step in (6, 8):
        assert f"no checkpoint of step {step}" in found[0]["said"]
    assert "(that of step 4 is whole); make room there, the training goes on" in found[0]["said"]
    assert found[0]["error"]
    assert not found[ROOMS[-1]]["error"]
