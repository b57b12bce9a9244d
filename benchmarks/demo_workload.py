"""The demo's requests: this server over gRPC beside transformers + PEFT, in one run.

360 short greedy requests, a third each for the base model and two adapters (rank 16, all linears),
interleaved. Ours: all at once over gRPC, 48 in flight. The peer: PEFT's mixed batches
(``generate(adapter_names=...)``) of the size that is best for it among those tried. Both
sides use the same weights, the same prompts and limits, and take turns. The peer computes in
bfloat16 where the CPU has instructions for it, else in float32, which is faster there. Tokens count
up to each request's end of text.

``make bench`` runs it. It uses the adapters that ``make demo`` trained, and trains them if need be.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.record import has_bfloat16, write_result
from examples.demo import IN_FLIGHT, MAX_NEW_TOKENS, MODELS, TASKS, questions, train
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.client import AsyncClient
from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.server.app import Server


class Job(NamedTuple):
    """One request."""

    prompt: str
    adapter: str | None


class Run(NamedTuple):
    """One pass over all requests: wall time, generated tokens, and the texts."""

    seconds: float
    tokens: int
    texts: list[str]


def jobs() -> list[Job]:
    pairs = zip(*map(questions, TASKS), strict=True)
    return [Job(q.prompt, name) for pair in pairs for q in pair for name in MODELS]


class Peer:
    """transformers + PEFT, with both adapters loaded beside each other."""

    def __init__(self, adapters: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.bfloat16 if has_bfloat16() else torch.float32
        directory = resolve_model("smollm2-135m")
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        first, *others = TASKS
        self.model: Any = PeftModel.from_pretrained(base, adapters / first, adapter_name=first)
        for name in others:
            self.model.load_adapter(adapters / name, adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def run(self, work: list[Job], batch_size: int) -> Run:
        """Answer all requests in batches of mixed adapters."""
        texts, tokens, started = [], 0, time.perf_counter()
        end = self.tokenizer.eos_token_id
        for at in range(0, len(work), batch_size):
            batch = work[at : at + batch_size]
            inputs = self.tokenizer([j.prompt for j in batch], return_tensors="pt", padding=True)
            output = self.model.generate(
                **inputs,
                adapter_names=[j.adapter or "__base__" for j in batch],
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=end,
            )
            for row in output[:, inputs["input_ids"].shape[1] :].tolist():
                tokens += row.index(end) + 1 if end in row else len(row)
                texts.append(str(self.tokenizer.decode(row, skip_special_tokens=True)))
        return Run(time.perf_counter() - started, tokens, texts)


async def run_ours(client: AsyncClient, work: list[Job]) -> Run:
    """Send all requests to the server, ``IN_FLIGHT`` at a time."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def ask(job: Job) -> tuple[int, str]:
        async with places:
            answer = await client.generate(
                job.prompt, adapter=job.adapter, max_new_tokens=MAX_NEW_TOKENS
            )
        return answer.generated_token_count, answer.text

    started = time.perf_counter()
    answers = await asyncio.gather(*map(ask, work))
    seconds = time.perf_counter() - started
    return Run(seconds, sum(count for count, _ in answers), [text for _, text in answers])


async def compare(adapters: Path, repeats: int) -> dict[str, Any]:
    work = jobs()
    config = ServerConfig(
        engine=EngineConfig(), host="127.0.0.1", port=0, metrics_port=None, adapters=adapters
    )
    peer = Peer(adapters)
    sample = work[:96]
    tried = {size: peer.run(sample, size).seconds for size in (16, 48)}
    best = min(tried, key=lambda size: tried[size])
    ours, theirs = [], []
    async with Server(config) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        await run_ours(client, sample)
        for _ in range(repeats):
            ours.append(await run_ours(client, work))
            theirs.append(await asyncio.to_thread(peer.run, work, best))
            gc.collect()
    same = sum(
        a.strip() == b.strip() for a, b in zip(ours[-1].texts, theirs[-1].texts, strict=True)
    )
    result = {
        "requests": len(work),
        "repeats": repeats,
        "peer_batch_size": best,
        "same_texts_in_bf16": same,
        "lorax": _summary(ours, len(work)),
        "transformers_peft": _summary(theirs, len(work)),
    }
    ratios = [t.seconds / o.seconds for o, t in zip(ours, theirs, strict=True)]
    return {**result, "times_faster_median": round(statistics.median(ratios), 2)}


def _summary(runs: list[Run], requests: int) -> dict[str, float]:
    return {
        "requests_per_second": round(statistics.median(requests / r.seconds for r in runs), 1),
        "tokens_per_second": round(statistics.median(r.tokens / r.seconds for r in runs), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--adapters", type=Path, default=Path("out/demo"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for task in TASKS:
        if not (options.adapters / task / "adapter_config.json").exists():
            train(task, options.adapters)
    result = asyncio.run(compare(options.adapters, options.repeats))
    print("| demo workload | requests/s | tokens/s |\n|---|---|---|")
    for label in ("lorax", "transformers_peft"):
        figures = result[label]
        print(f"| {label} | {figures['requests_per_second']} | {figures['tokens_per_second']} |")
    print(f"{result['times_faster_median']} times as fast (median of {options.repeats})")
    print(write_result(options.out, "demo_workload", result), file=sys.stderr)


if __name__ == "__main__":
    main()
