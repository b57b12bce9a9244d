"""A runner of weights that are in memory already is the one of the files they came from."""

from __future__ import annotations

from pathlib import Path

import torch

from lorax_serve.checkpoint.loader import load_weights
from lorax_serve.config import EngineConfig
from lorax_serve.model.runner import ModelRunner


def test_weights_in_memory_give_the_same_logits_as_their_files(tiny_model: Path) -> None:
    config = EngineConfig(model=str(tiny_model), dtype="float32", kernels="torch")
    of_files = ModelRunner(config)
    with load_weights(tiny_model, torch.float32, torch.device("cpu")) as weights:
        in_memory = ModelRunner.from_weights(config, weights)
    prompt, every = [5, 9, 77, 30], range(128)
    expected = of_files.logits_after(prompt, every, None)
    assert in_memory.logits_after(prompt, every, None) == expected
    assert in_memory.info.directory == ""
    assert in_memory.max_length == of_files.max_length
