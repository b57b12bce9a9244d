"""Adapters that PEFT wrote, damaged at random: refused with a message, or right."""

from __future__ import annotations

import random
import resource
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import LoRAWeights, match_weights, read
from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, SamplingParams, Sequence
from lorax_serve.errors import AdapterRejected
from tests.adapter.damage import MUTATIONS, VARIANTS
from tests.fidelity.variants import UNTIED, write_variant
from tests.model.logits_runner import LogitsRunner

PROMPT = [5, 9, 11, 40, 3, 77, 20, 100]
MAX_GROWTH = 300 << 20


@dataclass
class Bench:
    """The model, and each valid adapter with what it matches to."""

    model: Path
    runner: LogitsRunner
    valid: list[tuple[Path, LoRAWeights]]

    def matched(self, directory: Path) -> LoRAWeights:
        files = read(directory)
        return match_weights(files.config, files.tensors, self.runner.modules)

    def ours(self, weights: LoRAWeights) -> torch.Tensor:
        self.runner.put_adapter(0, self.runner.fold(weights))
        sequence = Sequence(
            0, list(PROMPT), len(PROMPT), 0, SamplingParams(), 9, 0, frozenset(), kv_slot=0,
            adapter_slot=0,
        )  # fmt: skip
        self.runner.run(Batch(prefills=[(sequence, len(PROMPT))]))
        return self.runner.last[0]

    def peft(self, directory: Path) -> torch.Tensor | None:
        """None where PEFT fails or warns: then there is nothing to compare with."""
        from peft import PeftModel

        auto: Any = AutoModelForCausalLM
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            try:
                base = auto.from_pretrained(self.model, dtype=torch.float32)
                model = PeftModel.from_pretrained(base, str(directory)).eval()
                logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0, -1]
            except Exception:
                return None
        keys = ("missing", "unexpected", "size mismatch")
        if any(word in str(each.message).lower() for each in caught for word in keys):
            return None
        return logits


def same(one: LoRAWeights, other: LoRAWeights) -> bool:
    """Bit for bit."""

    def parts(weights: LoRAWeights) -> dict[str, torch.Tensor]:
        found = dict(weights.parameters)
        for path, pair in weights.pairs.items():
            names = ("a", "b", "bias", "magnitude")
            found |= {f"{path} {n}": t for n in names if (t := getattr(pair, n)) is not None}
            found[f"{path} scale"] = torch.tensor(pair.scale, dtype=torch.float64)
        for path, tokens in weights.tokens.items():
            found[f"{path} rows"] = tokens.rows
            found[f"{path} ids"] = torch.tensor(tokens.token_ids)
        return found

    mine, theirs = parts(one), parts(other)
    return (
        mine.keys() == theirs.keys()
        and one.invocation_tokens == other.invocation_tokens
        and all(mine[n].dtype == theirs[n].dtype and torch.equal(mine[n], theirs[n]) for n in mine)
    )


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    config = EngineConfig(model=str(tiny_model), dtype="float32", kernels="torch")
    made = Bench(tiny_model, LogitsRunner(config), [])
    for seed, variant in enumerate(VARIANTS):
        directory = tmp_path_factory.mktemp("valid")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on merging, which is not for these tests
            write_variant(variant, tiny_model, UNTIED, directory, seed)
        made.valid.append((directory, made.matched(directory)))
    return made


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(150), id="some"),
        pytest.param(
            range(1000, 3000), id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]
        ),
    ],
)
def test_damage_is_refused_or_gives_what_peft_gives(
    bench: Bench, tmp_path: Path, seeds: range
) -> None:
    ends: Counter[str] = Counter()
    before = 0
    for count, seed in enumerate(seeds):
        rng = random.Random(seed)
        original, weights = rng.choice(bench.valid)
        directory = tmp_path / "mutated"
        shutil.copytree(original, directory)
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        mutate(rng, directory)
        what = f"seed {seed}: {mutate.__name__}"
        try:
            found = bench.matched(directory)
            logits = None if same(found, weights) else bench.ours(found)
        except AdapterRejected as error:
            assert str(error), what  # noqa: PT017
            ends[f"refused, {error.reason}"] += 1
        except Exception as error:
            raise AssertionError(what) from error
        else:
            theirs = None if logits is None else bench.peft(directory)
            if logits is None:
                ends["harmless"] += 1
            elif theirs is None:
                ends["not read by PEFT"] += 1
            elif not theirs.isfinite().all():
                assert not logits.isfinite().all(), what  # which fails requests that name it
                ends["NaN, as PEFT"] += 1
            else:
                scale = float(theirs.abs().max().clamp(min=1))
                torch.testing.assert_close(logits, theirs, atol=1e-4 * scale, rtol=0, msg=what)
                ends["as PEFT"] += 1
        shutil.rmtree(directory)
        if count == len(seeds) // 5:  # all that is loaded once is loaded
            before = resident()
    assert ends["harmless"] > 3
    assert ends["as PEFT"] > 3
    assert sum(n for end, n in ends.items() if end.startswith("refused")) > len(seeds) // 2
    assert resident() - before < MAX_GROWTH
