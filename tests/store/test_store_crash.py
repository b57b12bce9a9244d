"""Whenever the process is killed, all that was acknowledged is there, and nothing else is."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.store.crashing import HISTORY, Operation, check, foresee
from tests.store.sample import Model, quick_directory

ROOT = Path(__file__).parents[2]


def crashing(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.store.crashing", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_from_outside(kills: int, tmp_path: Path) -> None:
    """One state directory through many lives, each ended by SIGKILL at a random moment."""
    draw = random.Random(kills)
    model, last, done = Model(HISTORY), 0, 0
    for life in range(kills):
        wanted, moment = draw.randrange(24), draw.uniform(0, 0.03)
        running: Operation | None = None
        with crashing("work", tmp_path, life) as process:
            assert process.stdout is not None
            for count, line in enumerate(process.stdout):
                if count == wanted:
                    time.sleep(moment)  # not for something to happen: it spreads the kills
                    process.kill()
                message = json.loads(line)
                if "begins" in message:
                    kind, name, number = message["begins"]
                    running = kind, name, number
                else:
                    assert running is not None
                    sequence = message["done"]
                    assert sequence in (0, last + 1)
                    last = max(last, sequence)
                    model = foresee(model, running, sequence)
                    running = None
                    done += 1
        assert process.returncode == -9
        model = check(tmp_path, model, running, last + 1)
        last = max([last, *(number for each in model.names.values() for _, number in each)])
    assert done > 5 * kills


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_line(stride: int) -> None:
    """Killed between any two lines of the store's code, or every so many."""
    with quick_directory() as directory, crashing("lines", directory, stride) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(output)["crashes"] * stride > 500
