"""Next-token cross-entropy on the tokens to learn, and nothing computed for the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lorax_train.base import output_head
from lorax_train.batches import Batch

__all__ = ["TargetLoss", "mean_loss"]


class TargetLoss:
    """The loss of a model on a batch.

    With ``head_on_targets`` the output head runs on the hidden states of target positions only:
    with a large vocabulary and short answers it would otherwise be most of the work. That is right
    only where the logits are the head of the last hidden state and nothing more (no soft-capping,
    no scaling), which ``check`` finds out by trying.
    """

    def __init__(self, model: PreTrainedModel, *, head_on_targets: bool) -> None:
        self.model = model
        self.head_on_targets = head_on_targets

    @classmethod
    def check(cls, model: PreTrainedModel, batch: Batch) -> TargetLoss:
        """Choose ``head_on_targets`` by comparing both ways on ``batch``, bit for bit."""
        fast = cls(model, head_on_targets=True)
        whole = cls(model, head_on_targets=False)
        with torch.no_grad():
            hidden = fast.hidden(batch)
            head = output_head(model)
            if hidden is None or head is None:
                return whole
            same = torch.equal(head(hidden).float(), whole.all_logits(batch).float())
        return fast if same else whole

    def hidden(self, batch: Batch) -> torch.Tensor | None:
        """The last hidden states, ``[rows, length, hidden]``; None if the model keeps them."""
        if self.model.base_model is self.model:
            return None
        out = self.model.base_model(
            input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False
        )
        hidden = getattr(out, "last_hidden_state", None)
        return hidden if isinstance(hidden, torch.Tensor) else None

    def all_logits(self, batch: Batch) -> torch.Tensor:
        """The model's own logits, ``[rows, length, vocabulary]``."""
        out = self.model(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False)
        logits: torch.Tensor = out.logits
        return logits

    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits of every target, ``[n_targets, vocabulary]`` in the base's dtype.

        The logits for the token at position t are those that the model gives at t - 1.
        """
        at = batch.trained[:, 1:]
        if not self.head_on_targets:
            return self.all_logits(batch)[:, :-1][at]
        hidden, head = self.hidden(batch), output_head(self.model)
        assert hidden is not None  # check() has seen both
        assert head is not None
        logits: torch.Tensor = head(hidden[:, :-1][at])
        return logits

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The cross-entropy summed over the batch's targets: a float32 scalar, in nats."""
        labels = batch.tokens[:, 1:][batch.trained[:, 1:]]
        return F.cross_entropy(self.logits(batch).float(), labels, reduction="sum")


@torch.no_grad()
def mean_loss(loss: TargetLoss, batches: Iterable[Batch]) -> float:
    """The mean loss over all targets of ``batches``, each target weighing the same.

    The caller turns dropout off.
    """
    total, targets = 0.0, 0
    for batch in batches:
        total += loss(batch).item()
        targets += batch.n_targets
    return total / targets
