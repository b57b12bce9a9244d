"""The whole path in one command: train two adapters, serve them from one frozen model, compare.

Run it with ``make demo``. It trains on ``examples/data``, starts ``lorax-serve``, sends the
held-out prompts for the base model and both adapters at once, so that batches mix all three, and
counts exact answers. It exits non-zero unless each adapter beats the base model by 50 points on
its own task and does not on the other's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from lorax_serve.client import AsyncClient

DATA = Path(__file__).parent / "data"
TASKS = ("triage", "dates")
MODELS = (None, *TASKS)
TRAINING = {
    "--r": "16",
    "--lr": "2e-3",
    "--schedule": "linear",
    "--batch-size": "8",
    "--epochs": "2",
    "--seed": "1",
}
NEEDED_GAIN = 0.5
MAX_NEW_TOKENS = 16
IN_FLIGHT = 48
SHOWN = ("lorax_requests_total", "lorax_generated_tokens_total", "lorax_batch_size_")


class Question(NamedTuple):
    """A held-out row."""

    task: str
    prompt: str
    answer: str


def questions(task: str) -> list[Question]:
    rows = map(json.loads, (DATA / task / "heldout.jsonl").read_text().splitlines())
    return [Question(task, row["prompt"], row["completion"].strip()) for row in rows]


def train(task: str, adapters: Path) -> None:
    print(f"\n== train {task}", flush=True)
    command = [sys.executable, "-m", "lorax_train"]
    command += ["--data", str(DATA / task / "train.jsonl"), "--out", str(adapters / task)]
    command += [part for option in TRAINING.items() for part in option]
    subprocess.run(command, check=True)


@asynccontextmanager
async def server(adapters: Path) -> AsyncIterator[tuple[int, int]]:
    """Run ``lorax-serve`` on free ports; yields its gRPC and metrics ports."""
    print("\n== serve both from one frozen model", flush=True)
    command = [sys.executable, "-m", "lorax_serve.cli.serve", "--adapters", str(adapters)]
    process = await asyncio.create_subprocess_exec(
        *command, "--port", "0", "--metrics-port", "0", stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    report = ""
    while "ready:" not in report:
        line = (await process.stdout.readline()).decode()
        if not line:
            raise SystemExit(f"lorax-serve ended with {await process.wait()}")
        print("  " + line, end="")
        report += line
    ports = re.search(r"gRPC .*:(\d+)\nmetrics .*:(\d+)/", report)
    assert ports is not None
    try:
        yield int(ports[1]), int(ports[2])
    finally:
        process.send_signal(signal.SIGTERM)
        code = await process.wait()
        print(f"\nlorax-serve stopped with exit code {code}")
    if code != 0:
        raise SystemExit("lorax-serve did not stop cleanly")


async def side_by_side(client: AsyncClient, shown: list[Question]) -> None:
    """Stream a few prompts, each from all three models at the same time."""
    live = sys.stdout.isatty()
    print("\n== the same prompts, streamed from base and both adapters at once")
    for question in shown:
        print("\n" + question.prompt)
        texts = dict.fromkeys(MODELS, "")

        def row(texts: dict[str | None, str] = texts) -> str:
            cells = (f"{name or 'base'}: {' '.join(text.split())}" for name, text in texts.items())
            return " | ".join(f"{cell[:34]:34}" for cell in cells)

        async def follow(
            name: str | None, prompt: str, texts: dict[str | None, str] = texts
        ) -> None:
            stream = client.stream(prompt, adapter=name, max_new_tokens=MAX_NEW_TOKENS)
            async for chunk in stream:
                texts[name] += chunk.text
                if live:
                    print("\r" + row(), end="", flush=True)

        await asyncio.gather(*(follow(name, question.prompt) for name in MODELS))
        print(("\r" if live else "") + row())


async def ask_all(
    client: AsyncClient, asked: list[Question]
) -> tuple[dict[tuple[str | None, str], float], float]:
    """Send every prompt to every model, all interleaved; returns shares right and seconds."""
    places = asyncio.Semaphore(IN_FLIGHT)
    right: dict[tuple[str | None, str], int] = {(m, t): 0 for m in MODELS for t in TASKS}

    async def ask(question: Question, name: str | None) -> None:
        async with places:
            answer = await client.generate(
                question.prompt, adapter=name, max_new_tokens=MAX_NEW_TOKENS
            )
        assert answer.adapter == name
        right[name, question.task] += answer.text.strip() == question.answer

    started = time.perf_counter()
    await asyncio.gather(*(ask(question, name) for question in asked for name in MODELS))
    seconds = time.perf_counter() - started
    totals = {task: sum(question.task == task for question in asked) for task in TASKS}
    return {(m, t): count / totals[t] for (m, t), count in right.items()}, seconds


def verdict(shares: dict[tuple[str | None, str], float]) -> list[str]:
    """What the demo promised and did not hold."""
    wrong = []
    for name in TASKS:
        for task in TASKS:
            gain = shares[name, task] - shares[None, task]
            if (gain >= NEEDED_GAIN) != (name == task):
                wrong.append(f"{name} gains {100 * gain:+.0f} points over base on {task}")
    return wrong


async def compare(adapters: Path) -> list[str]:
    asked = [question for pair in zip(*map(questions, TASKS), strict=True) for question in pair]
    async with server(adapters) as (port, metrics_port):
        async with AsyncClient(f"localhost:{port}") as client:
            await side_by_side(client, asked[:4])
            print(f"\n== {len(asked) * len(MODELS)} held-out requests, base and adapters mixed")
            shares, seconds = await ask_all(client, asked)
        print(f"answered in {seconds:.1f} s; exact answers:\n\n{'':12}", end="")
        print("".join(f"{task:>10}" for task in TASKS))
        for name in MODELS:
            cells = "".join(f"{100 * shares[name, task]:9.0f}%" for task in TASKS)
            print(f"{name or 'base':12}{cells}")
        print(f"\n== from http://localhost:{metrics_port}/metrics")
        page = await asyncio.to_thread(fetch, f"http://localhost:{metrics_port}/metrics")
        for line in page.splitlines():
            if line.startswith(SHOWN) and "_bucket" not in line and "_created" not in line:
                print("  " + line)
    return verdict(shares)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        page: bytes = response.read()
    return page.decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where adapters go")
    parser.add_argument("--keep", action="store_true", help="use adapters trained before")
    options = parser.parse_args()
    started = time.perf_counter()
    for task in TASKS:
        if not (options.keep and (options.out / task / "adapter_config.json").exists()):
            train(task, options.out)
    wrong = asyncio.run(compare(options.out))
    print(f"\nthe demo took {time.perf_counter() - started:.0f} s")
    for line in wrong:
        print(f"NOT AS PROMISED: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
