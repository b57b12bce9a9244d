"""A run's data, from files to examples that fit the model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lorax_serve.errors import TrainingError
from lorax_train.base import Tokenizer, load_tokenizer, vocabulary_size
from lorax_train.batches import split
from lorax_train.config import DataConfig, TrainConfig
from lorax_train.console import Console
from lorax_train.encode import Example, encode_rows
from lorax_train.rows import Messages, Row, read_rows

__all__ = ["DataRows", "Dataset", "check_fit", "prepare", "read_data"]


@dataclass(frozen=True)
class DataRows:
    """What the files hold.

    Attributes:
        train: to train on, and to split off from.
        held_out: of a file of their own; may be empty.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]


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


def read_data(data: DataConfig) -> DataRows:
    """Read the rows.

    Raises:
        TrainingError: naming the file, line and flag.
    """
    rows = read_rows(data.train)
    if data.eval_split and len(rows) < 2:
        raise TrainingError("--eval-split needs at least two rows; give more, or --eval-data")
    return DataRows(rows, read_rows(data.eval_file) if data.eval_file else [])


def prepare(config: TrainConfig, rows: DataRows, source: Path, console: Console) -> Dataset:
    """Encode the rows.

    Args:
        config: says how long they may be, and how many are held out.
        rows: of the files.
        source: the base model's directory, which has the tokenizer.
        console: is told what was cut or left out.

    Raises:
        TrainingError: naming the file, line and flag.
    """
    data = config.data
    chat = any(isinstance(row.content, Messages) for row in (*rows.train, *rows.held_out))
    tokenizer = load_tokenizer(config.model, source, chat=chat)
    examples, warnings = encode_rows(rows.train, tokenizer, data.max_length)
    held_out: list[Example] = []
    if rows.held_out:
        held_out, more = encode_rows(rows.held_out, tokenizer, data.max_length)
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
    longest = max(examples, key=lambda example: len(example.tokens))
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(longest.tokens) > limit:
        raise TrainingError(
            f"{longest.where}: {len(longest.tokens)} tokens, but {config.model} has {limit} "
            f"positions; lower --max-length to {limit}"
        )
    vocabulary = vocabulary_size(model)
    highest = max(examples, key=lambda example: max(example.tokens))
    if max(highest.tokens) >= vocabulary:
        raise TrainingError(
            f"{highest.where}: token id {max(highest.tokens)}, but {config.model} has an embedding "
            f"of {vocabulary}; its tokenizer belongs to another model"
        )
