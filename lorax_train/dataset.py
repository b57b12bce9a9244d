"""A run's data, from files to examples that fit the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lorax_serve.errors import TrainingError
from lorax_train.base import Tokenizer, load_tokenizer, vocabulary_size
from lorax_train.batches import split
from lorax_train.config import TrainConfig
from lorax_train.console import Console
from lorax_train.encode import Example, encode_rows
from lorax_train.preference import encode_preferences, read_preferences
from lorax_train.rows import Messages, read_rows

__all__ = ["Dataset", "check_fit", "prepare"]

_Encode = Callable[[Any, Tokenizer, int], tuple[Sequence[Example], list[str]]]


@dataclass(frozen=True)
class Dataset:
    """What an adapter is trained and evaluated on.

    Attributes:
        examples: to train on.
        held_out: to evaluate on; may be empty.
        tokenizer: of the base model.
        sha256: of the training file.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]
    tokenizer: Tokenizer
    sha256: str


def prepare(config: TrainConfig, source: Path, console: Console) -> Dataset:
    """Read and encode the rows.

    Args:
        config: says where they are.
        source: the base model's directory, which has the tokenizer.
        console: is told what was cut or left out.

    Raises:
        TrainingError: naming the file, line and flag.
    """
    data = config.data
    preferences = config.objective.name == "dpo"
    read: Callable[[Path], list[Any]] = read_preferences if preferences else read_rows
    encode: _Encode = encode_preferences if preferences else encode_rows
    rows = read(data.train)
    eval_rows = read(data.eval_file) if data.eval_file else []
    if data.eval_split and len(rows) < 2:
        raise TrainingError("--eval-split needs at least two rows; give more, or --eval-data")
    chat = any(isinstance(row.content, Messages) for row in (*rows, *eval_rows))
    tokenizer = load_tokenizer(config.model, source, chat=chat)
    examples, warnings = encode(rows, tokenizer, data.max_length)
    held_out: Sequence[Example] = []
    if eval_rows:
        held_out, more = encode(eval_rows, tokenizer, data.max_length)
        warnings += [f"{data.eval_file}: {warning}" for warning in more]
    elif data.eval_split:
        if len(examples) < 2:
            raise TrainingError("--eval-split needs at least two rows that fit --max-length")
        examples, held_out = split(examples, data.eval_split, config.loop.seed)
    for warning in warnings:
        console.warn(warning)
    sha256 = hashlib.sha256(data.train.read_bytes()).hexdigest()
    return Dataset(examples, held_out, tokenizer, sha256)


def check_fit(config: TrainConfig, model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Make sure that the model has the positions and the tokens that the examples need.

    Raises:
        TrainingError: naming the row.
    """
    rows = [row for example in examples for row in example.rows]
    longest = max(rows, key=lambda example: len(example.tokens))
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(longest.tokens) > limit:
        raise TrainingError(
            f"{longest.where}: {len(longest.tokens)} tokens, but {config.model} has {limit} "
            f"positions; lower --max-length to {limit}"
        )
    vocabulary = vocabulary_size(model)
    highest = max(rows, key=lambda example: max(example.tokens))
    if max(highest.tokens) >= vocabulary:
        raise TrainingError(
            f"{highest.where}: token id {max(highest.tokens)}, but {config.model} has an embedding "
            f"of {vocabulary}; its tokenizer belongs to another model"
        )
