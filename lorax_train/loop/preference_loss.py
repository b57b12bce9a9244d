"""Direct preference optimization (DPO, arXiv:2305.18290) as the trainer's objective.

For a pair of answers, with the log-probabilities of all their tokens summed,
``-logsigmoid(beta * ((chosen - rejected) - (the base's chosen - the base's rejected)))``.
The reference is the base model, which is this model with its adapters switched off: there is no
second one. It is computed in the same step, without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lorax_serve.errors import TrainingError
from lorax_train.data.batches import Batch, Share, Span
from lorax_train.data.preference import PreferencePair
from lorax_train.distributed import Processes
from lorax_train.loop.loss import TargetLoss, cross_entropy
from lorax_train.loop.trainer import TrainingListener
from lorax_train.loop.training_run import TrainingRun
from lorax_train.model.layers import Routing

__all__ = ["PreferenceBatch", "PreferenceFigures", "PreferenceLoss"]


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """Pairs of answers of one or more adapters, two rows each.

    Attributes:
        rows: all answers.
        pair: int64 ``[n]``: which pair each of the rows' targets belongs to.
        sign: float32 ``[n]``: 1 for a target of a chosen answer, -1 for a rejected one's.
        weights: float32 ``[pairs]``: of each pair in the loss.
        betas: float32 ``[pairs]``.
        target_spans: of each adapter, by place in the pairs.
    """

    rows: Batch
    pair: torch.Tensor
    sign: torch.Tensor
    weights: torch.Tensor
    betas: torch.Tensor
    target_spans: tuple[Span, ...]

    @property
    def n_targets(self) -> int:
        """Number of pairs, which are what the loss is a mean over."""
        return len(self.weights)

    @property
    def n_tokens(self) -> int:
        """Tokens of all answers with their prompts."""
        return self.rows.n_tokens


@dataclass(slots=True)
class _Sums:
    pairs: int = 0
    margin: float = 0.0
    correct: int = 0


class PreferenceLoss:
    """The DPO loss of a batch of pairs.

    The loss of a pair depends on all of its tokens, but its gradient is that of a weighted sum of
    the tokens' losses: the derivative of the pair's loss is each one's weight. So what computes
    cross-entropies in pieces computes this too.

    Args:
        targets: the tokens' losses, which must be the cross-entropy.
        betas: of each adapter, by its number.
    """

    def __init__(self, targets: TargetLoss, betas: Mapping[int, float]) -> None:
        if targets.function is not cross_entropy:
            raise TrainingError("--objective dpo is made of log-probabilities; leave out --loss")
        self.targets = targets
        self.betas = betas
        self._sums: dict[int, _Sums] = {}

    @property
    def routing(self) -> Routing:
        """Of the adapters in the model."""
        return self.targets.routing

    def collate(self, shares: Sequence[Share], pad_id: int) -> PreferenceBatch:
        """A batch in the layout that the model takes, on its device.

        Args:
            shares: of ``PreferencePair``s, in the order of their adapters.
            pad_id: fills up short rows if they are padded.
        """
        pair: list[int] = []
        sign: list[float] = []
        weights: list[float] = []
        betas: list[float] = []
        spans, answers = [], []
        for share in shares:
            first = len(weights)
            rows = []
            for example in share.examples:
                assert isinstance(example, PreferencePair)
                for answer, direction in ((example.chosen, 1.0), (example.rejected, -1.0)):
                    rows.append(answer)
                    pair += [len(weights)] * answer.n_targets
                    sign += [direction] * answer.n_targets
                weights.append(share.weight)
                betas.append(self.betas[share.adapter])
            answers.append(Share(share.adapter, rows))
            spans.append(Span(share.adapter, first, len(weights)))
        batch = self.targets.collate(answers, pad_id)
        device = batch.labels.device
        return PreferenceBatch(
            rows=batch,
            pair=torch.tensor(pair, dtype=torch.int64, device=device),
            sign=torch.tensor(sign, device=device),
            weights=torch.tensor(weights, device=device),
            betas=torch.tensor(betas, device=device),
            target_spans=tuple(spans),
        )

    def __call__(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum over the pairs, a float32 scalar, and each pair's own loss ``[pairs]``,
        without a gradient."""
        with torch.no_grad(), self.routing.switched_off():
            reference = self.targets(batch.rows)[1]

        def margins(losses: torch.Tensor) -> torch.Tensor:
            """By how much more than the base the adapter prefers the chosen answers."""
            changes = (reference - losses) * batch.sign
            return batch.betas * torch.zeros_like(batch.betas).index_add(0, batch.pair, changes)

        def weigh(losses: torch.Tensor) -> torch.Tensor:
            slopes = batch.weights * batch.betas * torch.sigmoid(-margins(losses))
            return slopes[batch.pair] * batch.sign

        gradient = torch.is_grad_enabled()
        total, losses = self.targets(batch.rows, weigh if gradient else None)
        margin = margins(losses)
        each = F.softplus(-margin)
        self._note(batch, margin)
        value = (batch.weights * each).sum()
        return value + (total - total.detach()), each

    def take_figures(self, adapter: int, processes: Processes | None = None) -> dict[str, float]:
        """What has been seen of an adapter's pairs since this was last asked.

        Args:
            adapter: its number.
            processes: that have seen them, all of which ask at once.

        Returns:
            ``reward_margin``, the mean of beta times the log-ratio of the answers above the
            base's, and ``reward_accuracy``, the share of pairs in which it is above 0; nothing
            where no pair was seen.
        """
        own = self._sums.pop(adapter, _Sums())
        totals = (processes or Processes()).total([own.pairs, own.margin, own.correct])
        pairs, margin, correct = totals
        if not pairs:
            return {}
        return {"reward_margin": margin / pairs, "reward_accuracy": correct / pairs}

    def forget_figures(self, adapter: int) -> None:
        """Drop what has been seen of an adapter's pairs: they will be seen again."""
        self._sums.pop(adapter, None)

    def _note(self, batch: PreferenceBatch, margin: torch.Tensor) -> None:
        found = margin.detach().cpu()
        for span in batch.target_spans:
            if not bool(batch.weights[span.start : span.stop].any()):
                continue  # a row that only keeps step with other processes
            sums = self._sums.setdefault(span.adapter, _Sums())
            part: Any = found[span.start : span.stop]
            sums.pairs += len(part)
            sums.margin += float(part.sum())
            sums.correct += int((part > 0).sum())


class PreferenceFigures(TrainingListener):
    """Gives each run the margin and accuracy of its step or evaluation, for the listeners after
    this one to show: of the pairs of all processes."""

    def __init__(self, loss: PreferenceLoss, processes: Processes | None = None) -> None:
        self.loss = loss
        self.processes = processes or Processes()

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        """Of the step's pairs."""
        for run in runs:
            run.figures = self.loss.take_figures(run.adapter.index, self.processes)

    def shrunk(self, runs: Sequence[TrainingRun]) -> None:
        """All of it is computed again."""
        for run in runs:
            self.loss.forget_figures(run.adapter.index)

    def evaluated(self, run: TrainingRun, when: str) -> None:
        """Of the held-out pairs."""
        run.eval_figures = self.loss.take_figures(run.adapter.index, self.processes)
