"""What a step and a load take on a real replica: records, a fit, and draws from it."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["STEADY", "Costs", "Loaded", "Pace", "Step", "fit", "pace_of"]

_KEPT = 200


class Step(NamedTuple):
    """One step of a real engine.

    Attributes:
        decodes: sequences that decoded.
        prompt_tokens: computed beside them.
        adapters: distinct ones in the batch.
        puts: adapters that were brought into slots for it.
        beside_load: seconds of it during which the loading thread read an adapter.
        seconds: that it took, all of Python included.
        at: when it began, in seconds of the run.
    """

    decodes: int
    prompt_tokens: int
    adapters: int
    puts: int
    beside_load: float
    seconds: float
    at: float = 0.0


class Loaded(NamedTuple):
    """An adapter was read: how many seconds it took, and when it began."""

    seconds: float
    at: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How much longer than in the mean all work takes on a machine that others use too.

    Attributes:
        window: seconds.
        factors: of the first window, the second, and so on; the last goes on.
    """

    window: float
    factors: tuple[float, ...]

    def at(self, seconds: float) -> float:
        """The factor at a time."""
        return self.factors[min(len(self.factors) - 1, max(0, int(seconds / self.window)))]


STEADY = Pace(1.0, (1.0,))


@dataclass(frozen=True)
class Costs:
    """Seconds of a replica's work.

    Attributes:
        step: of each step.
        decode, prompt_token, adapter, put: for each of these.
        beside_load: that a step takes longer for each second that an adapter is read beside it.
        noise: a step's time over what the above say, of steps without prompts; all equally often.
        prompt_noise: of steps with prompts; empty: as ``noise``.
        loads: the seconds in which an adapter is read, checked and folded; all equally often.
        wakes: those from a message's coming until an idle engine takes it; all equally often.
    """

    step: float
    decode: float
    prompt_token: float
    adapter: float
    put: float
    beside_load: float
    noise: tuple[float, ...]
    loads: tuple[float, ...]
    wakes: tuple[float, ...] = (0.0,)
    prompt_noise: tuple[float, ...] = ()

    def seconds(self, decodes: int, prompt_tokens: int, adapters: int, puts: int) -> float:
        """Of a step, in the mean."""
        return (
            self.step
            + self.decode * decodes
            + self.prompt_token * prompt_tokens
            + self.adapter * adapters
            + self.put * puts
        )

    def factor(self, rng: random.Random, steps: int, *, prompts: bool) -> float:
        """How many times as long as in the mean ``steps`` steps take."""
        if steps == 1:
            return rng.choice(self.prompt_noise if prompts and self.prompt_noise else self.noise)
        # The mean of many is about normal; four draws of it are enough for what is left of it.
        mean = sum(rng.choice(self.noise) for _ in range(4)) / 4
        spread: float = (mean - self._usual) * (4 / max(steps, 4)) ** 0.5
        return max(0.1, self._usual + spread)

    @functools.cached_property
    def _usual(self) -> float:
        return sum(self.noise) / len(self.noise)

    def load(self, rng: random.Random) -> float:
        """Seconds of one load."""
        return rng.choice(self.loads)

    def wake(self, rng: random.Random) -> float:
        """Seconds until an idle engine takes a message."""
        return rng.choice(self.wakes)

    def as_json(self) -> dict[str, Any]:
        """Plain data, to five digits."""

        def short(value: object) -> object:
            if isinstance(value, (tuple, list)):
                return [short(each) for each in value]
            return float(f"{value:.5g}")

        return {name: short(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Costs:
        """Of ``as_json``."""
        lists = {name: tuple(fields[name]) for name in ("noise", "loads", "wakes", "prompt_noise")}
        return cls(**(fields | lists))


def fit(
    steps: Sequence[Step],
    loads: Sequence[Loaded],
    wakes: Sequence[float] = (0.0,),
    pace: Pace = STEADY,
) -> Costs:
    """Costs that explain the steps, by least squares; none is negative.

    Args:
        steps: at least a few of each kind; those beside loads are not needed.
        loads: each load.
        wakes: seconds of each time that an idle engine was woken.
        pace: the machine's, which is taken out of both.

    Raises:
        ValueError: there is nothing to fit.
    """
    if not steps or not loads:
        raise ValueError(f"{len(steps)} steps, {len(loads)} loads: at least one of each is needed")
    rows, seconds = _table(steps), np.array([s.seconds / pace.at(s.at) for s in steps])
    found = _not_negative(rows, seconds)
    expected = rows @ np.array(found)
    prompts = rows[:, 2] > 0
    reading = [load.seconds / pace.at(load.at) for load in loads]
    return Costs(
        *(found[0], found[1], found[2], found[3], found[4], found[5]),
        noise=_noise(seconds[~prompts], expected[~prompts]) or (1.0,),
        prompt_noise=_noise(seconds[prompts], expected[prompts]),
        loads=_spread(reading),
        wakes=_spread(wakes or (0.0,)),
    )


def _noise(seconds: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Ratios, such that their mean gives the seconds of all steps together."""
    if not len(seconds):
        return ()
    ratios = np.array(_spread(seconds / expected))
    return tuple(map(float, ratios * (seconds.sum() / expected.sum() / ratios.mean())))


def _spread(values: np.ndarray[Any, Any] | Sequence[float]) -> tuple[float, ...]:
    """As many values as are kept, each of which stands for as many: in their order, the means of
    equal parts. Their mean is that of all, and the largest of many thousands does not become one of
    two hundred."""
    parts = np.array_split(np.sort(values), min(_KEPT, len(values)))
    return tuple(float(part.mean()) for part in parts)


def pace_of(steps: Sequence[Step], window: float) -> Pace:
    """The machine's pace while these steps ran: in each window, their seconds over what a fit of
    all says of them. A window without steps has the pace of the one before it."""
    rows, seconds = _table(steps), np.array([s.seconds for s in steps])
    expected = rows @ np.array(_not_negative(rows, seconds))
    windows = np.array([max(0, int(s.at / window)) for s in steps])
    spent, wanted = np.bincount(windows, seconds), np.bincount(windows, expected)
    factors = [1.0]
    for took, should in zip(spent, wanted, strict=True):
        factors.append(float(took / should) if should else factors[-1])
    return Pace(window, tuple(factors[1:]))


def _table(steps: Sequence[Step]) -> np.ndarray[Any, Any]:
    """What each step's seconds are made of, in the order of the fields of ``Costs``."""
    return np.array(
        [(1, s.decodes, s.prompt_tokens, s.adapters, s.puts, s.beside_load) for s in steps], float
    )


def _not_negative(rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> list[float]:
    """Least squares; a coefficient that would be negative is 0, and the others are found anew."""
    used = [column for column in range(rows.shape[1]) if rows[:, column].any()]
    while True:
        found = np.linalg.lstsq(rows[:, used], values, rcond=None)[0]
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    return [float(found[used.index(c)]) if c in used else 0.0 for c in range(rows.shape[1])]
