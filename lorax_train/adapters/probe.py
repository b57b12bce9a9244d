"""The golden probe of a trained adapter: a prompt on which it can be told from its base.

It is computed from A and B as they are saved, which may be rounded, on the model in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from lorax_serve.adapter.probe import MAX_PROMPT, MIN_PROMPT, TOP, Probe
from lorax_serve.errors import TrainingError
from lorax_train.data.encode import Example
from lorax_train.model.inject import TrainableLoRA

__all__ = ["compute_probe"]

_CANDIDATES = 8


@torch.no_grad()
def compute_probe(
    model: PreTrainedModel,
    adapter: TrainableLoRA,
    examples: Sequence[Example],
    saved: torch.dtype,
    fingerprint: str,
    served: AbstractContextManager[None] | None = None,
) -> Probe:
    """Choose the prompt on which adapter and base differ most, and compute the probe on it.

    The prompts are the beginnings, of 4 to 32 tokens, of up to 8 of the examples. What is compared
    is ``Probe.visibility``. The result depends on nothing but the arguments.

    Args:
        model: the base with the adapter in it.
        adapter: unchanged when this returns, but for its dropout, which is off.
        examples: held-out ones, where there are some.
        saved: dtype of A and B in the file.
        fingerprint: of the base weights.
        served: within it, the model computes with the weights that are served, where those that it
            was trained with are another form of them. Prompts are chosen without it: it is slow.

    Raises:
        TrainingError: when a logit is not a finite number.
    """
    adapter.train(False)
    dtype = str(model.dtype).removeprefix("torch.")

    def probe(prompt: tuple[int, ...], tuned: torch.Tensor, base: torch.Tensor) -> Probe:
        after = tuned[len(prompt) - 1]
        logits, ids = after.topk(min(TOP, len(after)))
        return Probe(
            token_ids=prompt,
            top=tuple(zip(ids.tolist(), logits.tolist(), strict=True)),
            base=tuple(base[len(prompt) - 1][ids].tolist()),
            scale=after.std().item(),
            base_fingerprint=fingerprint,
            dtype=dtype,
        )

    with adapter.rounded(saved):
        best: Probe | None = None
        for example in examples[:: max(1, len(examples) // _CANDIDATES)][:_CANDIDATES]:
            # Whatever follows a row of one or two tokens is as good as anything else.
            row = example.rows[0].tokens
            tokens = (row * MIN_PROMPT)[: max(MIN_PROMPT, len(row))][:MAX_PROMPT]
            tuned, base = _both(model, adapter, tokens)
            for length in range(MIN_PROMPT, len(tokens) + 1):
                found = probe(tokens[:length], tuned, base)
                if best is None or found.visibility > best.visibility:
                    best = found
        assert best is not None  # there are examples: training needs one
        # Alone, as the server will compute it.
        with served or nullcontext():
            return probe(best.token_ids, *_both(model, adapter, best.token_ids))


def _both(
    model: PreTrainedModel, adapter: TrainableLoRA, tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits after each of ``tokens``, ``[tokens, vocabulary]`` float32: adapter's, base's."""
    ids = torch.tensor([tokens], device=model.device)

    def logits() -> torch.Tensor:
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        result: torch.Tensor = out.logits[0].float().cpu()
        if not bool(result.isfinite().all()):
            raise TrainingError(
                "the trained model's logits are not finite numbers, so nothing was saved; try a "
                "lower --lr, or --dtype float32"
            )
        return result

    with adapter.alone():
        tuned = logits()
    with adapter.switched_off():
        return tuned, logits()
