"""What makes two trainings the same: all that the result depends on."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from lorax_train.config import TrainConfig
from lorax_train.data.dataset import Dataset
from lorax_train.data.encode import Example

__all__ = ["ADDED_LATER", "differences", "identity"]

ADDED_LATER = {"--compile": False}
"""What identities of earlier versions do not have, and what it was then."""

# Of these, the result does not depend; or what they name is in the identity in another way.
_LEFT_OUT = {
    "output",
    "model",
    "device",
    "dtype",
    "fsdp",
    "name",
    "command",
    "data.train",
    "data.eval_file",
    "data.cache",
    "loop.log_every",
    "loop.save_every",
    "loop.batch_size",
    "loop.grad_accumulation",
    "loop.checkpointing",
}
_FLAGS = {"optimizer.name": "--optimizer", "objective.name": "--objective"}
_ROWS, _HELD_OUT, _MODEL = "--data", "--eval-data", "--model"
_CHANGED = {
    _ROWS: f"{_ROWS} has other rows",
    _HELD_OUT: "other rows are held out (--eval-data, --eval-split)",
    _MODEL: f"{_MODEL} has other weights",
}


def identity(config: TrainConfig, data: Dataset, model: str, dtype: str) -> dict[str, Any]:
    """By flags, in JSON's types: what must be the same for a run to go on.

    Args:
        config: of one adapter.
        data: as it was read for it.
        model: identifies the base's weights.
        dtype: of the base.
    """
    found: dict[str, Any] = {
        _MODEL: model,
        "--dtype": dtype,
        _ROWS: _digest(data.examples),
        _HELD_OUT: _digest(data.held_out),
        # Which rows share a step depends on the product alone.
        "--batch-size x --grad-accumulation": config.loop.batch_size
        * config.loop.grad_accumulation,
    }
    for name, value in _flat(config).items():
        found[_FLAGS.get(name, "--" + name.rpartition(".")[2].replace("_", "-"))] = value
    result: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return result


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], words: str = "{} was {} and is {}"
) -> list[str]:
    """What has changed, for people; empty if nothing has.

    Args:
        before, now: from ``identity``.
        words: with places for the flag and its two values.
    """
    return [
        _CHANGED.get(flag) or words.format(flag, _said(before.get(flag)), _said(now.get(flag)))
        for flag in dict.fromkeys([*now, *before])
        if before.get(flag) != now.get(flag)
    ]


def _flat(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(config):
        part = getattr(config, field.name)
        if field.name in _LEFT_OUT:
            continue
        if not is_dataclass(part):
            found[field.name] = part
            continue
        names = [f"{field.name}.{each.name}" for each in fields(part)]
        found |= {
            name: getattr(part, name.split(".")[1]) for name in names if name not in _LEFT_OUT
        }
    return found


def _digest(examples: Sequence[Example]) -> str:
    """Over the tokens and which of them are learned: so the tokenizer is in it too."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(array("q", example.tokens).tobytes())
        digest.update(bytes(example.trained))
    return digest.hexdigest()


def _said(value: object) -> str:
    return "not given" if value is None else str(value)
