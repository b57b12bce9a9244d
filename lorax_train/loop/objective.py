"""From the configs' objectives to the loss that the trainer is given."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from lorax_train.config import TrainConfig
from lorax_train.distributed import Processes
from lorax_train.loop.custom_loss import load_loss, try_loss
from lorax_train.loop.loss import LossFunction, Objective, TargetLoss, cross_entropy
from lorax_train.loop.preference_loss import PreferenceFigures, PreferenceLoss
from lorax_train.loop.trainer import TrainingListener
from lorax_train.model.base import vocabulary_size
from lorax_train.model.inject import TrainableLoRA

__all__ = ["choose_function", "choose_objective", "try_function"]


def choose_function(config: TrainConfig) -> LossFunction:
    """The loss of each token: the cross-entropy, or what ``--loss`` names.

    Raises:
        TrainingError: when there is no such function.
    """
    where = config.objective.loss
    return cross_entropy if where is None else load_loss(where)


def try_function(config: TrainConfig, function: LossFunction, model: PreTrainedModel) -> None:
    """See what a function of the user's own returns, before it is relied on.

    Raises:
        TrainingError: saying what is wrong with it.
    """
    if config.objective.loss is not None:
        try_loss(config.objective.loss, function, vocabulary_size(model), model.device)


def choose_objective(
    loss: TargetLoss,
    configs: Sequence[TrainConfig],
    adapters: Sequence[TrainableLoRA],
    processes: Processes,
) -> tuple[Objective, list[TrainingListener]]:
    """What is trained on, and listeners that must come before all others, in each process."""
    if configs[0].objective.name != "dpo":
        return loss, []
    betas = {
        adapter.index: config.objective.beta
        for adapter, config in zip(adapters, configs, strict=True)
    }
    preference = PreferenceLoss(loss, betas)
    return preference, [PreferenceFigures(preference, processes)]
