"""Processes that die at work, run as ``python -m tests.store.crashing``.

``work DIR SEED`` does random operations until it is killed, and says what it begins and what it
acknowledges. ``lines DIR STRIDE`` lets forked children do the same few operations, each killed at
another line of the store's code, and checks what each leaves.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lorax_serve import store
from lorax_serve.store.catalog import Catalog
from lorax_serve.store.content import ContentStore
from lorax_serve.store.recovery import recover
from tests.store.sample import CATALOG, Model, contents_of, digest, load, unload

HISTORY = 2
SCRIPT = [
    ("load", "a", 1),
    ("load", "b", 2),
    ("load", "a", 3),
    ("roll back", "a", 1),
    ("load", "b", 1),
    ("load", "a", 4),
    ("load", "a", 5),  # 1 or 3 goes
    ("unload", "b", 0),
    ("load", "c", 2),
    ("unload", "a", 0),
]
Operation = tuple[str, str, int]


def perform(content: ContentStore, catalog: Catalog, operation: Operation) -> int:
    """One operation as a server does it; returns its sequence number, 0 if it has none."""
    kind, name, number = operation
    if kind == "load":
        return load(content, catalog, name, number).sequence
    if kind == "unload":
        unload(content, catalog, name)
        return 0
    return catalog.roll_back(name, catalog.history(name)[number - 1].digest).sequence


def foresee(model: Model, operation: Operation, sequence: int) -> Model:
    """The model after the operation."""
    kind, name, number = operation
    after = model.copy()
    if kind == "load":
        after.load(name, digest(number), sequence)
    elif kind == "unload":
        after.unload(name)
    else:
        after.roll_back(name, sequence, number)
    return after


def check(root: Path, before: Model, running: Operation | None, sequence: int) -> Model:
    """Reopen after a crash: what was acknowledged is there, whole, and nothing else.

    Args:
        root: the state directory.
        before: what was acknowledged.
        running: the operation that was not acknowledged; it has happened or not, as a whole.
        sequence: that it would have.

    Returns:
        What is there.
    """
    with ContentStore(root) as content, Catalog(root / CATALOG, HISTORY) as catalog:
        assert all(content.verify(each) for each in os.listdir(root / "adapters")), "not whole"
        recovery = recover(content, catalog, verify=True)
        assert (recovery.missing, recovery.damaged) == ((), ()), recovery
        found = contents_of(catalog)
        allowed = [before] + ([foresee(before, running, sequence)] if running else [])
        matching = [model for model in allowed if model.names == found]
        assert matching, (found, [model.names for model in allowed])
        kept = set(os.listdir(root / "adapters"))
        assert kept == matching[0].referenced(), kept
        assert all(content.verify(each) for each in kept)
        assert not os.listdir(root / "staging")
    # A journal that was begun only is void, and SQLite leaves it until it writes the next one.
    left = {path.name for path in root.iterdir()} - {f"{CATALOG}-journal"}
    assert left == {"adapters", "staging", "lorax.lock", CATALOG}, left
    return matching[0]


def work(root: Path, seed: int) -> None:
    draw = random.Random(seed)
    with ContentStore(root) as content, Catalog(root / CATALOG, HISTORY) as catalog:
        recover(content, catalog)
        while True:
            name = draw.choice("abcd")
            earlier = len(catalog.history(name))
            kinds = ["load"] * 3 + ["unload"] * (catalog.get(name) is not None)
            kind = draw.choice(kinds + ["roll back"] * (earlier > 0))
            number = draw.randint(1, earlier) if kind == "roll back" else draw.randrange(8)
            say({"begins": [kind, name, number]})
            say({"done": perform(content, catalog, (kind, name, number))})


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def die_at(line: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that kills the process at that line, counted over all that are executed
    in the store, and where it deletes directories."""
    traced, left = (str(Path(store.__file__).parent), shutil.__file__), line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(traced):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def lines(root: Path, stride: int) -> None:
    at = crashes = 0
    while True:
        at += stride
        state = root / str(at)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            sys.settrace(die_at(at))
            with ContentStore(state) as content, Catalog(state / CATALOG, HISTORY) as catalog:
                recover(content, catalog)
                for operation in SCRIPT:
                    os.write(writer, b"%d " % perform(content, catalog, operation))
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            acknowledged = [int(sequence) for sequence in pipe.read().split()]
        _, status = os.waitpid(child, 0)
        model = Model(HISTORY)
        for operation, sequence in zip(SCRIPT, acknowledged, strict=False):
            model = foresee(model, operation, sequence)
        running = SCRIPT[len(acknowledged)] if len(acknowledged) < len(SCRIPT) else None
        check(state, model, running, max([0, *acknowledged]) + 1)
        shutil.rmtree(state)
        if not os.WIFSIGNALED(status):
            assert acknowledged[-1:] == [0], "the script has not been done"
            say({"crashes": crashes})
            return
        crashes += 1


if __name__ == "__main__":
    {"work": work, "lines": lines}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
