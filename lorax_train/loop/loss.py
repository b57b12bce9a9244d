"""The loss of a model on a batch: next-token cross-entropy on the tokens to learn, and nothing
computed for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorax_train.data.batches import Batch, Span, collate
from lorax_train.data.encode import Example
from lorax_train.model.attention import BOUNDS, use_row_attention
from lorax_train.model.base import output_head
from lorax_train.model.head import head_loss
from lorax_train.model.layers import LoRALayer, Routing
from lorax_train.model.lean import make_lean
from lorax_train.model.lean_ops import PLAIN, LeanOps

__all__ = ["CHUNK", "LossFunction", "Objective", "TargetLoss", "cross_entropy", "summed_loss"]

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From logits ``[n, vocabulary]`` float32 and labels ``[n]`` to each target's loss ``[n]``."""

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""From each target's loss ``[n]`` float32 to each target's weight in the sum ``[n]``."""

CHUNK = 256
"""So many targets' logits exist at a time where the head's own gradient is wanted."""
# Sums of products in another order differ by this much of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The default loss of each target, in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


class Objective(Protocol):
    """What the trainer needs of a loss. Its targets are what the loss is a mean over: tokens, or
    pairs of answers."""

    @property
    def routing(self) -> Routing:
        """Of the adapters in the model."""

    def collate(self, shares: Any, pad_id: int) -> Any:
        """A batch, with ``target_spans``, ``n_targets`` and ``n_tokens``."""

    def __call__(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum over the batch's targets, a float32 scalar, and each target's own loss,
        without a gradient."""


class TargetLoss:
    """The loss of a model on a batch.

    Args:
        model: the base, with or without adapters in it.
        routing: tells the layers whose the tokens are.
        padded: whether the model must have padded rows, because it does not call the attention
            that keeps rows apart.
        head_on_targets: whether the logits are the head of the last hidden state and nothing more
            (no soft-capping, no scaling): then they are computed for the targets only.
        function: of each target's logits and label.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        routing: Routing | None = None,
        *,
        padded: bool = True,
        head_on_targets: bool = False,
        function: LossFunction = cross_entropy,
    ) -> None:
        self.model = model
        self.routing = routing or Routing()
        self.padded = padded
        self.head_on_targets = head_on_targets
        self.function = function

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        example: Example,
        routing: Routing | None = None,
        function: LossFunction = cross_entropy,
        ops: LeanOps = PLAIN,
    ) -> TargetLoss:
        """Make the model compute no more than is needed, as far as a trial shows that it computes
        the same; to be called before adapters are put into it.

        Args:
            model: frozen; changed in place.
            example: to try it on.
            routing: of the adapters to come.
            function: of each target's logits and label.
            ops: what norms and gated MLPs are computed with.
        """
        rows = [example, Example(example.tokens[::-1], example.trained, example.where)]
        plain = collate(rows, 0, padded=True).to(model.device)
        loss = cls(model, routing, function=function)
        with torch.no_grad():
            expected = loss.logits(plain)
            hidden, head = loss.hidden(plain), output_head(model)
            if hidden is not None and head is not None:
                found = head(hidden.flatten(0, 1)[plain.before])
                loss.head_on_targets = torch.equal(found, expected)
            make_lean(model, ops)
            loss.padded = not loss._keeps_rows_apart(rows, expected)
        return loss

    @property
    def head_is_frozen(self) -> bool:
        """Whether nothing of the head is trained and the loss is the default one: then the
        gradient of the hidden state is computed on the way."""
        return self.function is cross_entropy and not isinstance(output_head(self.model), LoRALayer)

    def collate(self, shares: Any, pad_id: int) -> Batch:
        """A batch in the layout that the model takes, on its device."""
        return collate(shares, pad_id, padded=self.padded).to(self.model.device)

    def hidden(self, batch: Batch) -> torch.Tensor | None:
        """The last hidden states, ``[rows, length, hidden]``; None if the model keeps them."""
        if self.model.base_model is self.model:
            return None
        with self._routed(batch):
            out = self.model.base_model(**self._inputs(batch))
        hidden = getattr(out, "last_hidden_state", None)
        return hidden if isinstance(hidden, torch.Tensor) else None

    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits of every target, ``[n, vocabulary]`` in the base's dtype.

        The logits for the token at position t are those that the model gives at t - 1.
        """
        if not self.head_on_targets:
            with self._routed(batch):
                logits: torch.Tensor = self.model(**self._inputs(batch)).logits
            return logits.flatten(0, 1)[batch.before]
        hidden, head = self.hidden(batch), output_head(self.model)
        assert hidden is not None  # prepare() has seen both
        assert head is not None
        with self.routing.to(batch.target_spans):
            found: torch.Tensor = head(hidden.flatten(0, 1)[batch.before])
        return found

    def __call__(
        self, batch: Batch, weigh: Weigh | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum over the batch's targets, a float32 scalar, and each target's own loss
        ``[n]``, without a gradient. In nats, with the default function.

        Args:
            batch: with the weights.
            weigh: makes the weights of the losses instead. They are constants for the gradient.
        """
        head = output_head(self.model)
        if not self.head_on_targets or head is None:
            return _weighed(self.function(self.logits(batch).float(), batch.labels), batch, weigh)
        hidden = self.hidden(batch)
        assert hidden is not None
        at_targets = hidden.flatten(0, 1)[batch.before]
        if self.head_is_frozen:
            weight: Any = head.weight
            bias = getattr(head, "bias", None)
            weights = batch.weights
            if weigh is not None:  # the head's gradient needs the weights in its forward
                with torch.no_grad():
                    weights = weigh(head_loss(at_targets, weight, batch.labels, weights, bias)[1])
            return head_loss(at_targets, weight, batch.labels, weights, bias)
        return _weighed(self._in_chunks(head, at_targets, batch), batch, weigh)

    def _keeps_rows_apart(self, rows: Sequence[Example], expected: torch.Tensor) -> bool:
        """Have the model attend within rows, if it gives what it gives for padded rows then."""
        model = self.model
        before = model.config._attn_implementation
        try:
            use_row_attention(model)
            self.padded = False
            found = self.logits(collate(rows, 0).to(model.device))
            worst = (found - expected).abs().max() / expected.abs().max()
            apart = bool(worst <= _TOLERANCE[expected.dtype])  # False as well if it is no number
        except (TypeError, ValueError, RuntimeError):
            apart = False
        if not apart:
            model.set_attn_implementation(before)
        return apart

    def _in_chunks(self, head: nn.Module, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """With a trained head, or another loss: logits are computed again for the gradient."""

        def loss_of(part: torch.Tensor, labels: torch.Tensor, adapter: int, draw: int) -> Any:
            with self.routing.to((Span(adapter, 0, len(part)),), draws={adapter: draw}):
                return self.function(head(part).float(), labels)

        losses = []
        for span in batch.target_spans:
            for start in range(span.start, span.stop, CHUNK):
                at = slice(start, min(start + CHUNK, span.stop))
                draw = hash((self.routing.draws.get(span.adapter, 0), start - span.start))
                args = (hidden[at], batch.labels[at], span.adapter, draw)
                losses.append(checkpoint(loss_of, *args, use_reentrant=False))
        return torch.cat(losses)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.tokens,
            "attention_mask": batch.mask,
            "use_cache": False,
        }
        if batch.bounds is not None:
            inputs |= {"position_ids": batch.positions, BOUNDS: batch.bounds}
        return inputs

    def _routed(self, batch: Batch) -> AbstractContextManager[None]:
        real = None if batch.mask is None else batch.mask.flatten() > 0
        return self.routing.to(batch.spans, real)


def _weighed(
    losses: torch.Tensor, batch: Batch, weigh: Weigh | None
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = batch.weights if weigh is None else weigh(losses.detach())
    return (losses * weights).sum(), losses.detach()


@torch.no_grad()
def summed_loss(loss: Objective, batches: Iterable[Any]) -> tuple[float, int]:
    """The sum of the losses of all targets of ``batches``, and the number of these targets.

    The caller turns dropout off.
    """
    total, targets = 0.0, 0
    for batch in batches:
        total += float(loss(batch)[1].sum())
        targets += batch.n_targets
    return total, targets
