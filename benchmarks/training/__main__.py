"""lorax-train beside PEFT with transformers' Trainer: real tokens a second, memory, loss curves.

Every case and system runs in a process of its own, by turns, so that a busy moment of the machine
meets all of them. Tokens are counted without padding. What is compared:

- mixed: prompt and completion rows of 25 to 300 tokens, batch 8;
- full: rows of 256 tokens of text, all learned, batch 4;
- many: 8 adapters of rank 8, batch 1 x 128 each, at once, against one after another; also with
  activation checkpointing, for less memory.

PEFT's baseline is what its users write: transformers' Trainer with bf16, adapters in float32 under
autocast. ``tuned`` also has rows of like length share a batch. Both start from the same A and see
the same rows in the same order as ours (but for ``tuned``, whose order is its own).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.command import parser
from benchmarks.measure import digits
from benchmarks.record import has_bfloat16, write_result
from lorax_train.threads import let_idle_threads_sleep

_WARM = 3


def cases(steps: int) -> dict[str, dict[str, Any]]:
    """By name, what a worker is told."""
    mixed = {"rows": "mixed", "batch": 8, "steps": steps}
    full = {"rows": "full", "batch": 4, "length": 256, "steps": steps}
    many = {"rows": "full", "batch": 1, "length": 128, "adapters": 8}
    return {
        "mixed_ours": {"system": "ours", **mixed},
        "mixed_peft": {"system": "peft", **mixed},
        "mixed_tuned": {"system": "peft", "tuned": True, **mixed},
        "full_ours": {"system": "ours", **full},
        "full_peft": {"system": "peft", **full},
        "many_ours": {"system": "ours", **many, "steps": steps},
        "many_checkpointed": {"system": "ours", "checkpointing": True, **many, "steps": steps},
        "many_one_by_one": {"system": "ours", "one_by_one": True, **many, "steps": steps},
        "one_ours": {"system": "ours", **many, "adapters": 1, "steps": steps},
    }


def run_case(case: Mapping[str, Any]) -> dict[str, Any]:
    """Have a worker do it; returns its steps and peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "case.json"
        file.write_text(json.dumps({**case, "scratch": scratch}))
        command = [sys.executable, "-m", "benchmarks.training.worker", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    raise RuntimeError(f"{case}: the worker failed: {done.stderr[-2000:]}")


def speed(result: Mapping[str, Any]) -> float:
    """Real tokens a second after the first steps."""
    steps = result["steps"][_WARM:]
    return float(sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps))


def curve_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest relative difference of the losses at one step."""
    pairs = zip(ours["steps"], theirs["steps"], strict=True)
    return float(max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs))


def measure(options: Any) -> dict[str, Any]:
    """All cases by turns; medians over the rounds."""
    let_idle_threads_sleep()  # of the workers of all systems
    dtype = "bfloat16" if has_bfloat16() else "float32"
    wanted = {
        name: {**case, "model": options.model, "dtype": dtype, "threads": options.threads}
        for name, case in cases(options.steps).items()
        if not options.cases or name.partition("_")[0] in options.cases
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for number in range(options.repeats):
        for name in list(wanted)[:: 1 if number % 2 == 0 else -1]:
            result = run_case(wanted[name])
            results[name].append(result)
            print(f"round {number + 1}: {name} {speed(result):.0f} tokens/s", file=sys.stderr)
    figures: dict[str, float] = {}
    for name, found in results.items():
        figures[f"{name}_tok_s"] = digits(statistics.median(map(speed, found)))
        figures[f"{name}_gb"] = digits(statistics.median(r["peak_bytes"] for r in found) / 1e9)
    for kind in ("mixed", "full"):
        if f"{kind}_ours" in results:
            ours, theirs = results[f"{kind}_ours"][0], results[f"{kind}_peft"][0]
            figures[f"{kind}_times"] = ratio(figures, f"{kind}_ours_tok_s", f"{kind}_peft_tok_s")
            figures[f"{kind}_memory"] = ratio(figures, f"{kind}_ours_gb", f"{kind}_peft_gb")
            figures[f"{kind}_loss_difference"] = digits(curve_difference(ours, theirs))
    if "mixed_tuned" in results:
        figures["mixed_times_tuned"] = ratio(figures, "mixed_ours_tok_s", "mixed_tuned_tok_s")
    if "many_ours" in results and "one_ours" in results:
        figures["many_times"] = ratio(figures, "many_ours_tok_s", "many_one_by_one_tok_s")
        figures["many_memory"] = ratio(figures, "many_ours_gb", "one_ours_gb")
        figures["many_checkpointed_times"] = ratio(
            figures, "many_checkpointed_tok_s", "many_one_by_one_tok_s"
        )
        figures["many_checkpointed_memory"] = ratio(figures, "many_checkpointed_gb", "one_ours_gb")
    if options.out:
        write_result(options.out, "training", {
            "settings": {"dtype": dtype, "repeats": options.repeats, "steps": options.steps},
            "figures": figures,
            "rounds": {name: [digits(speed(each)) for each in r] for name, r in results.items()},
            "losses": {name: [s["loss"] for s in r[0]["steps"]] for name, r in results.items()},
        })  # fmt: skip
        plot(options.out / "training.png", results)
    return figures


def ratio(figures: Mapping[str, float], one: str, other: str) -> float:
    """How many times the other."""
    return digits(figures[one] / figures[other])


def plot(path: Path, results: Mapping[str, list[dict[str, Any]]]) -> None:
    """The loss curves of ours and PEFT's, one above the other."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, kind in zip(axes, ("mixed", "full"), strict=True):
        for name, style in ((f"{kind}_peft", "-"), (f"{kind}_ours", "--")):
            if name in results:
                losses = [step["loss"] for step in results[name][0]["steps"]]
                axis.plot(range(1, len(losses) + 1), losses, style, label=name.split("_")[1])
        axis.set(title=kind, xlabel="step", ylabel="loss (nats a token)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--steps", type=int, default=12)
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--cases", nargs="+", choices=("mixed", "full", "many", "one"))
    print(json.dumps(measure(flags.parse_args())))
