"""One system trains in a process of its own: ``python -m benchmarks.training.worker CASE.json``.

Writes a JSON object to standard output: seconds and real tokens of each step, losses, peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.workload import full_rows, mixed_rows
from lorax_serve.checkpoint.source import resolve_model
from lorax_train.config import InjectionConfig, LoopConfig, OptimizerConfig
from lorax_train.data.encode import Example
from lorax_train.data.tokenizer import load_tokenizer
from lorax_train.loop.loss import TargetLoss
from lorax_train.loop.trainer import Trainer, TrainingListener
from lorax_train.loop.training_run import TrainingRun
from lorax_train.memory import peak_memory
from lorax_train.model.base import load_model
from lorax_train.model.checkpointing import checkpoint_layers
from lorax_train.model.inject import inject_all
from lorax_train.model.start import init_a

RANK, ALPHA, LR, SEED = 8, 16.0, 2e-4, 0


class InOrder(TrainingRun):
    """Takes the rows as they come, as the baseline does."""

    def _plan(self) -> Iterator[list[list[Example]]]:
        size = self.loop.batch_size
        for start in range(0, len(self.examples), size):
            yield [list(self.examples[start : start + size])]


class Stopwatch(TrainingListener):
    """Seconds, real tokens and loss of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.tokens = 0
        self.last = time.perf_counter()

    def stepped(self, runs: Any) -> None:
        now = time.perf_counter()
        tokens = sum(run.record.tokens for run in runs)
        loss = sum(run.record.step_loss for run in runs) / len(runs)
        self.steps.append(
            {"seconds": now - self.last, "tokens": tokens - self.tokens, "loss": loss}
        )
        self.tokens, self.last = tokens, now

    def started(self, runs: Any) -> None:
        self.last = time.perf_counter()


def rows_of(case: dict[str, Any], tokenizer: Any) -> list[list[Example]]:
    """The rows of each adapter."""
    count = case["steps"] * case["batch"]
    adapters = range(case.get("adapters", 1))
    if case["rows"] == "mixed":
        return [mixed_rows(tokenizer, count, SEED + i) for i in adapters]
    return [full_rows(tokenizer, count, case["length"], SEED + i) for i in adapters]


def ours(case: dict[str, Any]) -> list[dict[str, float]]:
    """All adapters at once, or (``one_by_one``) one after another."""
    source = resolve_model(case["model"])
    tokenizer = load_tokenizer(case["model"], source, chat=False)
    rows = rows_of(case, tokenizer)
    dtype = getattr(torch, case["dtype"])
    model = load_model(case["model"], source, dtype, torch.device("cpu"))
    loss = TargetLoss.prepare(model, rows[0][0])
    lora = InjectionConfig(r=RANK, alpha=ALPHA)
    adapters = inject_all(
        model, [lora] * len(rows), case["model"], [SEED + i for i in range(len(rows))]
    )
    loss.routing = adapters[0].routing
    if case.get("checkpointing"):
        checkpoint_layers(model, loss.routing)
    settings = OptimizerConfig(lr=LR, schedule="constant", warmup_ratio=0.0, max_grad_norm=1.0)
    loop = LoopConfig(batch_size=case["batch"], max_steps=case["steps"], seed=SEED)
    runs = [
        InOrder(adapter, own, [], settings, loop)
        for adapter, own in zip(adapters, rows, strict=True)
    ]
    watch = Stopwatch()
    if case.get("one_by_one"):
        for run in runs:
            watch.tokens = 0
            Trainer(loss, [run], tokenizer.pad_id, [watch]).train()
    else:
        Trainer(loss, runs, tokenizer.pad_id, [watch]).train()
    return watch.steps


def peft(case: dict[str, Any]) -> list[dict[str, float]]:
    """PEFT with transformers' Trainer, as its users write it; ``tuned``: with adapters in float32
    under autocast, and rows of like length together in what the collator sees."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers import Trainer as HFTrainer

    source = resolve_model(case["model"])
    tokenizer = load_tokenizer(case["model"], source, chat=False)
    (rows,) = rows_of(case, tokenizer)
    if case.get("tuned"):
        size = case["batch"]
        rows = sorted(rows, key=lambda row: len(row.tokens))
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(SEED))
        rows = [row for i in order.tolist() for row in batches[i]]
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(source, dtype=getattr(torch, case["dtype"]))
    model: Any = get_peft_model(
        base,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=True,
    )
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():  # the same start as ours
        if hasattr(module, "lora_A") and len(module.lora_A):
            a = module.lora_A["default"].weight
            a.data.copy_(init_a(RANK, a.shape[1], "kaiming", generator))
    data = [
        {
            "input_ids": list(row.tokens),
            "attention_mask": [1] * len(row.tokens),
            "labels": [
                t if trained else -100 for t, trained in zip(row.tokens, row.trained, strict=True)
            ],
        }
        for row in rows
    ]
    steps: list[dict[str, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            at = len(steps) * case["batch"]
            tokens = sum(len(row.tokens) for row in rows[at : at + case["batch"]])
            seconds = time.perf_counter() - self.started
            steps.append({"seconds": seconds, "tokens": tokens, "loss": 0.0})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                steps[state.global_step - 1]["loss"] = logs["loss"]

    class InRowOrder(HFTrainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(data)  # type: ignore[arg-type, unused-ignore]

    arguments = TrainingArguments(
        output_dir=case["scratch"],
        per_device_train_batch_size=case["batch"],
        max_steps=case["steps"],
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=case["dtype"] == "bfloat16",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=SEED,
    )
    collator = DataCollatorForSeq2Seq(tokenizer.hf, label_pad_token_id=-100)
    trainer = InRowOrder(
        model=model, args=arguments, train_dataset=data, data_collator=collator,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    return steps


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(wanted["threads"])
    measured = {"ours": ours, "peft": peft}[wanted["system"]](wanted)
    peak = peak_memory(torch.device("cpu")) or 0
    print("RESULT " + json.dumps({"steps": measured, "peak_bytes": peak}), flush=True)
