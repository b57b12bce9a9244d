from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import read
from lorax_serve.errors import TrainingError
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.loop.training_run import TrainingRun
from lorax_train.model.lean_ops import PLAIN, compiled_ops
from lorax_train.run import train, train_all

Rows = list[dict[str, Any]]
Configure = Callable[..., TrainConfig]
WriteRows = Callable[..., Path]


def silent() -> Console:
    return Console(io.StringIO())


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        ("llama", InjectionConfig(r=4)),
        ("llama", InjectionConfig(r=3, alpha=5, rslora=True, targets="q_proj,down_proj")),
        ("llama", InjectionConfig(r=2, targets=r"regex:.*\.1\..*(q_proj|up_proj)")),
        ("gpt2", InjectionConfig(r=4, dropout=0.1)),
        ("gpt2", InjectionConfig(r=2, targets="qkv", init="gaussian")),
        ("gemma2", InjectionConfig(r=4)),
    ],
    indirect=["base"],
)
def test_peft_loads_the_files_and_computes_what_was_trained(
    base: Path, lora: InjectionConfig, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    result = train(configure(base, write_rows(pairs), lora=lora), silent())
    assert result.directory is not None
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        loaded = PeftModel.from_pretrained(plain, result.directory).eval()
        theirs = loaded(input_ids=tokens).logits
        result.adapter.train(False)
        ours = result.model(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - before).abs().max() > 0.01


@pytest.mark.parametrize("lora", [InjectionConfig(), InjectionConfig(dropout=0.1)])
def test_the_same_seed_gives_the_same_bytes(
    lora: InjectionConfig, llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = write_rows(pairs)
    contents = []
    for out, seed in (("a", 7), ("b", 7), ("c", 8)):
        loop = LoopConfig(max_steps=3, batch_size=4, seed=seed)
        directory = train(configure(llama, data, out=out, lora=lora, loop=loop), silent()).directory
        assert directory is not None
        contents.append((directory / "adapter_model.safetensors").read_bytes())
    assert contents[0] == contents[1]
    start = 8 + int.from_bytes(contents[0][:8], "little")
    assert (
        contents[0][start:] != contents[2][start:]
    )  # the tensors, not only the seed in the header


def test_accumulating_two_batches_of_four_equals_one_of_eight(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = write_rows(pairs)
    tensors = []
    for out, rows, times in (("a", 8, 1), ("b", 4, 2)):
        loop = LoopConfig(epochs=2, batch_size=rows, grad_accumulation=times)
        result = train(configure(llama, data, out=out, loop=loop), silent())
        assert result.record.steps == 4
        tensors.append(result.adapter.tensors(torch.float32))
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_small_set_is_learned_by_heart(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = DataConfig(write_rows(pairs[:4]), eval_file=write_rows(pairs[:4], "eval.jsonl"))
    record = train(configure(llama, data, steps=60), silent()).record
    assert record.eval_losses[0] > 3
    assert record.eval_losses[-1] < 0.3
    assert len(record.eval_losses) == 61  # before, and after each epoch of one step
    assert record.tokens_per_second > 0


def test_other_formats_train_too(llama: Path, configure: Configure, write_rows: WriteRows) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for i, row in enumerate(({"messages": chat}, {"text": "some text"})):
        record = train(configure(llama, write_rows([row] * 4), out=f"o{i}"), silent()).record
        assert record.steps == 3


def test_the_files_say_where_they_come_from(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = DataConfig(write_rows(pairs), eval_split=0.25)
    config = configure(llama, data)
    out = dataclasses.replace(config.output, save_dtype="bfloat16")
    result = train(dataclasses.replace(config, output=out), silent())
    files = read(config.output.directory)
    assert {tensor.dtype for tensor in files.tensors.values()} == {torch.bfloat16}
    assert files.config.base_model_name_or_path == str(llama)
    assert files.config.task_type == "CAUSAL_LM"
    assert files.config.target_modules == (
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    )
    weights = config.output.directory / "adapter_model.safetensors"
    with safetensors.safe_open(weights, "pt") as file:
        header = file.metadata()
    assert header["producer"].startswith("lorax-train ")
    assert header["base_model"] == str(llama)
    assert (header["seed"], header["steps"], len(header["data_sha256"])) == ("0", "3", 64)
    assert float(header["train_loss"]) == pytest.approx(result.record.train_loss, abs=1e-6)
    best = min(result.record.evaluations, key=lambda each: each.loss)
    assert float(header["eval_loss"]) == pytest.approx(best.loss, abs=1e-6)
    card = (config.output.directory / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")  # the base is no model on the Hub
    assert f"| held-out loss after | {best.loss:.4f} (step {best.step}) |" in card


def test_ctrl_c_saves_what_was_learned(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    class Impatient(Console):
        def stepped(self, runs: Sequence[TrainingRun]) -> None:
            if runs[0].record.steps == 2:
                raise KeyboardInterrupt

    stream = io.StringIO()
    result = train(configure(llama, write_rows(pairs), steps=50), Impatient(stream))
    assert result.record.interrupted
    assert result.record.steps == 2
    assert "interrupted; saved what there is: 2 steps" in stream.getvalue()
    assert result.directory is not None
    assert any(tensor.abs().max() > 0 for n, tensor in read(result.directory).tensors.items())
    assert "2 (interrupted)" in (result.directory / "README.md").read_text()


def test_ctrl_c_before_the_first_step_saves_nothing(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    class MoreImpatient(Console):
        def started(self, runs: Sequence[TrainingRun]) -> None:
            raise KeyboardInterrupt

    config = configure(llama, write_rows(pairs))
    assert train(config, MoreImpatient(io.StringIO())).directory is None
    assert not config.output.directory.exists()


def test_a_loss_that_is_no_number_stops_the_run(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    config = configure(llama, write_rows(pairs), optimizer=OptimizerConfig(lr=1e30))
    with pytest.raises(TrainingError, match=r"step \d: the .* not a finite number.*lower --lr"):
        train(config, silent())
    assert [path.name for path in config.output.directory.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("also", [False, True])
def test_of_several_those_that_diverge_are_named_and_the_others_saved(
    also: bool, llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = write_rows(pairs)
    configs = []
    for name, lr in (("calm", 1e30 if also else 1e-3), ("wild", 1e30)):
        config = configure(llama, data, optimizer=OptimizerConfig(lr=lr))
        output = dataclasses.replace(config.output, directory=config.output.directory / name)
        loop = dataclasses.replace(config.loop, save_every=1)
        configs.append(dataclasses.replace(config, name=name, output=output, loop=loop))
    said = io.StringIO()
    ending = "nothing was saved" if also else "the others are saved"
    with pytest.raises(TrainingError, match=rf"of wild is not a finite number.*\({ending}\)$"):
        train_all(configs, Console(said))
    assert "wild is not a finite number" in said.getvalue()
    calm, wild = (config.output.directory for config in configs)
    assert (calm / "adapter_model.safetensors").exists() is not also
    steps = sorted(path.name for path in (calm / "checkpoints").glob("step-*"))
    assert "step-0" not in steps
    assert [path.name for path in wild.iterdir()] == ["log.jsonl"]
    assert json.loads((wild / "log.jsonl").read_text().splitlines()[-1])["failure"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_of_memory_says_what_to_change(
    error: Exception, llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    class Full(Console):
        def started(self, runs: Sequence[TrainingRun]) -> None:
            raise error

    with pytest.raises(TrainingError, match="out of memory; lower --batch-size"):
        train(configure(llama, write_rows(pairs)), Full(io.StringIO()))


def test_rows_that_do_not_fit_the_model_are_refused(
    llama: Path, configure: Configure, write_rows: WriteRows
) -> None:
    data = write_rows([{"text": "x" * 200}])
    with pytest.raises(TrainingError, match=r"line 1: 201 tokens, but .* has 128 positions"):
        train(configure(llama, data), silent())


def test_a_split_needs_rows_to_train_on(
    llama: Path, configure: Configure, write_rows: WriteRows
) -> None:
    data = DataConfig(write_rows([{"text": "x"}]), eval_split=0.5)
    with pytest.raises(TrainingError, match="--eval-split needs at least two rows"):
        train(configure(llama, data), silent())


def test_an_output_that_would_lose_something_is_refused_before_the_data_is_read(
    llama: Path, configure: Configure, tmp_path: Path
) -> None:
    def attempt(directory: Path, overwrite: bool = False) -> None:
        output = OutputConfig(directory, overwrite)
        train(configure(llama, tmp_path / "no-such-rows", output=output), silent())

    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match=r"--out .*file is a file"):
        attempt(tmp_path / "file")
    with pytest.raises(TrainingError, match=r"--out .*below cannot be written"):
        attempt(tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(TrainingError, match=r"something else than an adapter \(thesis.txt\).*--ov"):
        attempt(tmp_path / "full")
    for fine, overwrite in ((tmp_path / "full", True), (tmp_path / "new" / "deep", False)):
        with pytest.raises(TrainingError, match="no-such-rows cannot be read"):
            attempt(fine, overwrite)
    (tmp_path / "full" / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainingError, match="no-such-rows cannot be read"):
        attempt(tmp_path / "full")


def test_compiled_a_run_learns_the_same(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    config = configure(llama, write_rows(pairs))
    plain = train(config, silent()).adapter.tensors(torch.float32)
    output = dataclasses.replace(config.output, overwrite=True)
    result = train(dataclasses.replace(config, compile=True, output=output), silent())
    ops = {getattr(module, "ops", None) for module in result.model.modules()}
    assert compiled_ops(torch.device("cpu"), torch.float32) in ops
    assert PLAIN not in ops
    for name, tensor in result.adapter.tensors(torch.float32).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-5)
