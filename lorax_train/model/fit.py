"""Whether a model can take the rows that it is to be trained on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from lorax_serve.errors import TrainingError
from lorax_train.config import TrainConfig
from lorax_train.data.batches import longest_row
from lorax_train.data.encode import Example
from lorax_train.data.token_store import StoredExamples
from lorax_train.data.windows import Windows
from lorax_train.model.base import vocabulary_size

__all__ = ["check_fit"]


def check_fit(config: TrainConfig, model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Make sure that the model has the positions and the tokens that the examples need.

    Raises:
        TrainingError: naming the row.
    """
    longest = longest_row(examples)
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(longest.tokens) > limit:
        flag = "--window" if isinstance(examples, Windows) else "--max-length"
        raise TrainingError(
            f"{longest.where}: {len(longest.tokens)} tokens, but {config.model} has {limit} "
            f"positions; lower {flag} to {limit}"
        )
    vocabulary = vocabulary_size(model)
    if isinstance(examples, StoredExamples):
        where = examples.where(*examples.table[examples.highest][["file", "number"]].item())
        highest = int(examples.table["highest"].max())
    else:
        highest, where = max((max(example.tokens), example.where) for example in examples)
    if highest >= vocabulary:
        raise TrainingError(
            f"{where}: token id {highest}, but {config.model} has an embedding of {vocabulary}; "
            "its tokenizer belongs to another model"
        )
