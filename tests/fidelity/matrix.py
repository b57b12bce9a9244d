"""One mixed batch of all variants, some of them added up, and base rows; and what PEFT gives for
each row alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lorax_serve import adapter as leaf
from lorax_serve.adapter import LoRAWeights
from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, NEVER, Batch, SamplingParams, Sequence
from tests.fidelity.compositions import COMPOSITIONS, compositions_of, peft_sum
from tests.fidelity.variants import (
    BARE,
    GPT2,
    INVOCATION,
    TIED,
    UNTIED,
    VARIANTS,
    with_prefix,
    write_variant,
)
from tests.helpers import TINY_GPT2, TINY_LLAMA, save_tiny_model
from tests.model.logits_runner import LogitsRunner

__all__ = ["GROUPS", "Case", "Group", "run_group", "weights_of", "write_group"]

STEPS = 6
# In bfloat16, PEFT itself is 0.1 to 0.2 away from its results in float32 on these models, whose
# logits have a deviation of 1 to 2.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}


@dataclass(frozen=True)
class Group:
    """Cases that share a batch.

    Attributes:
        ranks: processes that compute the model together.
    """

    model: str
    dtype: str
    kernels: str
    ranks: int = 1

    def __str__(self) -> str:
        many = f" in {self.ranks} processes" if self.ranks > 1 else ""
        return f"{self.model} {self.dtype} {self.kernels}{many}"


GROUPS = [
    Group(model, dtype, kernels)
    for model in (UNTIED, TIED, GPT2)
    for dtype in ("float32", "bfloat16")
    for kernels in (("torch",) if model == GPT2 else ("torch", "compiled"))
] + [
    Group(UNTIED, "float32", "paged", ranks=2),
    Group(TIED, "bfloat16", "paged", ranks=2),
    Group(GPT2, "float32", "paged", ranks=2),
]


@dataclass(frozen=True)
class Case:
    """One variant or composition in one group.

    Attributes:
        error: the largest difference of any logit from PEFT's.
        effect: the largest difference of PEFT's from the base model's: what a variant that is
            ignored would be wrong by.
    """

    group: Group
    variant: str
    error: float
    effect: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance for the dtype."""
        return self.error <= TOLERANCE[self.group.dtype]


def write_group(model: str, place: Path) -> tuple[Path, dict[str, Path]]:
    """A model of that kind and the adapters of all variants that it has, written by PEFT."""
    directory = place / "model"
    config: Any = TINY_GPT2
    if model != GPT2:
        llama: Any = LlamaConfig
        sizes = {"hidden_size": 96, "head_dim": 32, "attention_bias": True, "mlp_bias": True}
        tied = {"tie_word_embeddings": model == TIED}
        config = llama(**{**TINY_LLAMA.to_diff_dict(), **sizes, **tied})
    assert isinstance(config, LlamaConfig | GPT2Config)
    save_tiny_model(directory, config)
    adapters = {}
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        if variant.fields(model) is not None:
            adapters[name] = place / name.replace(" ", "-")
            with warnings.catch_warnings():
                # On tied weights and on what it stores of embeddings, which is what is tested.
                warnings.simplefilter("ignore")
                write_variant(variant, directory, model, adapters[name], seed)
    return directory, adapters


def run_group(group: Group, model: Path, adapters: dict[str, Path]) -> Iterator[Case]:
    """Serve all adapters, sums of them, and base rows in one batch, each row against PEFT alone."""
    names: list[str | None] = [None, *adapters, *compositions_of(adapters), None]
    runner = LogitsRunner(
        EngineConfig(
            model=str(model),
            dtype=group.dtype,
            kernels=group.kernels,
            max_batch_size=len(names),
            max_batch_tokens=4096,
            tensor_parallel=group.ranks,
        )
    )
    with closing(runner):
        names_and_rows = list(_serve(runner, names, adapters))
    for name, sequence, rows in names_and_rows:
        yield _case(group, model, name, adapters, sequence, rows)


def _serve(
    runner: LogitsRunner, names: list[str | None], adapters: dict[str, Path]
) -> Iterator[tuple[str | None, Sequence, list[torch.Tensor]]]:
    """Each row's name, its sequence, and the logits of its last tokens."""
    sequences = list(_sequences(runner, names, adapters))
    # Half of them begin alone, so that later steps mix decoding rows with prompts, in chunks.
    first, second = sequences[::2], sequences[1::2]
    runner.step(Batch(prefills=[(s, len(s.tokens)) for s in first]))
    runner.step(Batch(decodes=first, prefills=[(s, 5) for s in second]))
    for sequence in second:
        sequence.computed = 5
    runner.step(Batch(decodes=first, prefills=[(s, len(s.tokens) - 5) for s in second]))
    seen: list[list[torch.Tensor]] = [[] for _ in sequences]
    for _ in range(STEPS):
        runner.step(Batch(decodes=sequences))
        for rows, sequence in zip(seen, sequences, strict=True):
            rows.append(runner.logits[sequence.request_id])
    return zip(names, sequences, seen, strict=True)


def _sequences(
    runner: LogitsRunner, names: list[str | None], adapters: dict[str, Path]
) -> Iterator[Sequence]:
    generator = torch.Generator().manual_seed(3)
    for row, name in enumerate(names):
        prompt = torch.randint(12, 119, (8 + row,), generator=generator).tolist()
        # Twice: the last place counts.
        prompt[1:3], prompt[-4:-2] = INVOCATION, INVOCATION
        sequence = Sequence(row, prompt, len(prompt), row, SamplingParams(), 99, 0, frozenset())
        # Rows out of order, as after sequences have come and gone.
        sequence.kv_slot = (row * 7) % len(names) if len(names) % 7 else len(names) - 1 - row
        if name is None:
            sequence.adapter_slot = BASE
        else:
            sequence.adapter_slot = row
            weights = weights_of(name, COMPOSITIONS.get(name), runner, adapters)
            runner.put_adapter(row, runner.fold(weights))
            if weights.invocation_tokens:
                found = weights.invocation_tokens == INVOCATION
                sequence.adapter_start = len(prompt) - 4 if found else NEVER
        yield sequence


def weights_of(
    name: str,
    parts: Mapping[str, float] | None,
    runner: LogitsRunner,
    adapters: Mapping[str, Path],
) -> LoRAWeights:
    """Of a variant, or of the sum of some."""
    if parts is not None:
        read = [(part, weights_of(part, None, runner, adapters), parts[part]) for part in parts]
        return leaf.compose([(part, runner.without_copies(w), scale) for part, w, scale in read])
    files = leaf.read(adapters[name])
    return leaf.match_weights(files.config, files.tensors, runner.modules)


def _case(
    group: Group,
    model: Path,
    name: str | None,
    adapters: dict[str, Path],
    sequence: Sequence,
    rows: list[torch.Tensor],
) -> Case:
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(model, dtype=getattr(torch, group.dtype)).eval()
    kwargs: dict[str, Any] = {}
    count = sequence.computed
    tokens = torch.tensor([sequence.tokens[:count]])
    places = range(count - len(rows), count)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = base(tokens).logits[0, places].float()
        theirs = base
        if name in COMPOSITIONS:
            theirs = peft_sum(base, COMPOSITIONS[name], adapters).eval()
        elif name is not None:
            from peft import PeftModel

            directory = adapters[name]
            if name == BARE:  # which PEFT would not read
                directory = with_prefix(directory)
            theirs = PeftModel.from_pretrained(base, directory).eval()
            if sequence.adapter_start:
                start = sequence.adapter_start
                kwargs["alora_offsets"] = [None if start == NEVER else count - start]
        wanted = theirs(tokens, **kwargs).logits[0, places].float()
    error = (torch.stack(rows).float() - wanted).abs().max().item()
    return Case(group, name or "base", error, (wanted - plain).abs().max().item())
