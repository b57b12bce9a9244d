"""What every system trains on: the same rows in the same order, as token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from lorax_train.data.encode import Example
from lorax_train.data.tokenizer import Tokenizer

__all__ = ["full_rows", "mixed_rows"]

_DATA = Path(__file__).parents[2] / "examples" / "data"


def _pairs() -> list[tuple[str, str]]:
    rows = []
    for name in ("triage", "dates"):
        for line in (_DATA / name / "train.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append((row["prompt"], row["completion"]))
    return rows


def mixed_rows(tokenizer: Tokenizer, count: int, seed: int) -> list[Example]:
    """Prompts of 0 to 9 solved examples and a question, of which the answer is learned: 25 to 300
    tokens, most of them read."""
    chance, pairs = random.Random(f"mixed {seed}"), _pairs()
    found = []
    for number in range(count):
        shots = chance.sample(pairs, 1 + min(int(chance.expovariate(0.4)), 9))
        *before, (question, answer) = shots
        prompt = "".join(f"{asked}{answered}\n\n" for asked, answered in before) + question
        read = tokenizer.encode(prompt, special=True)
        learned = [*tokenizer.encode(answer, special=False), tokenizer.eos_id]
        trained = (False,) * len(read) + (True,) * len(learned)
        found.append(Example((*read, *learned), trained, f"row {number}"))
    return found


def full_rows(tokenizer: Tokenizer, count: int, length: int, seed: int) -> list[Example]:
    """Rows of ``length`` tokens of running text, all learned."""
    chance, pairs = random.Random(f"full {seed}"), _pairs()
    stream: list[int] = []
    while len(stream) < count * length:
        asked, answered = chance.choice(pairs)
        stream += tokenizer.encode(f"{asked}{answered}\n\n", special=False)
    trained = (False, *[True] * (length - 1))
    parts: Sequence[list[int]] = [stream[i * length : (i + 1) * length] for i in range(count)]
    return [Example(tuple(part), trained, f"row {i}") for i, part in enumerate(parts)]
