"""What a run has come to, as JSON and tensors, and back.

That is all there is: the order of the rows and dropout's masks depend on the seed and the step
alone, and the learning rate on the step.
"""

from __future__ import annotations

from typing import Any

import torch

from lorax_train.loop.training_run import Evaluation, TrainingRun

__all__ = ["restore", "state_of", "tensors_of"]


def state_of(run: TrainingRun) -> dict[str, Any]:
    """The record of a run, of JSON's types; floats come back with the same bits."""
    record = run.record
    return {
        "steps": record.steps,
        "tokens": record.tokens,
        "seconds": record.seconds,
        "evaluations": [[each.step, each.loss] for each in record.evaluations],
        "stopped_early": record.stopped_early,
        "failure": record.failure,
        "recent": [list(each) for each in record.recent],
        "gradient_norm": run.gradient_norm,
        "rows": run.rows,
        "done": run.done,
    }


def tensors_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    """The tensors of a run by name: not copies.

    ``PATH.a``, ``PATH.b`` and ``PATH.magnitude`` are what is trained, float32; ``NAME/KEY`` is the
    optimizer's state of one of them, ``NAME/best`` its value at the lowest held-out loss; and
    ``PATH.start.a``, ``PATH.start.b`` are what is not trained, because decompositions on another
    machine have other signs.
    """
    found: dict[str, torch.Tensor] = {}
    for number, (name, parameter) in enumerate(_named(run).items()):
        found[name] = parameter.detach()
        found |= {
            f"{name}/{key}": value for key, value in run.optimizer.state.get(parameter, {}).items()
        }
        if run.best is not None:
            found[f"{name}/best"] = run.best[number]
    return found | _starts(run)


def restore(run: TrainingRun, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Have a new run be as ``state_of`` and ``tensors_of`` found another one.

    Args:
        run: of the same config and data.
        state, tensors: of the other.

    Raises:
        ValueError: when they are not of such a run.
    """
    named = _named(run)
    starts = _starts(run)
    wanted = {name: tensor.shape for name, tensor in (*named.items(), *starts.items())}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if "/" not in name}
    if shapes != wanted:
        other = sorted(
            name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name)
        )
        raise ValueError(f"{other[0]} is not what this training has")
    with torch.no_grad():
        for name, tensor in (*named.items(), *starts.items()):
            tensor.copy_(tensors[name])
    best = []
    for name, parameter in named.items():
        own = {
            key.removeprefix(f"{name}/"): _like(value, parameter)
            for key, value in tensors.items()
            if key.startswith(f"{name}/")
        }
        if "best" in own:
            best.append(own.pop("best"))
        if own:
            run.optimizer.state[parameter] = own
    run.best = best or None
    record = run.record
    record.tokens, record.seconds = state["tokens"], state["seconds"]
    record.evaluations = [Evaluation(*each) for each in state["evaluations"]]
    record.stopped_early = state["stopped_early"]
    record.failure = state.get("failure", "")  # which older checkpoints lack
    record.recent.clear()
    record.recent.extend((loss, n) for loss, n in state["recent"])
    run.gradient_norm = state["gradient_norm"]
    run.rows = min(run.rows, state["rows"])
    run.skip_to(state["steps"])


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """On the parameter's device and in its layout, which fused optimizers take for granted."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _named(run: TrainingRun) -> dict[str, torch.nn.Parameter]:
    """What is trained, in ``run.parameters``' order."""
    found: dict[str, Any] = {}
    for path, pair in run.adapter.pairs().items():
        found |= {f"{path}.a": pair.a, f"{path}.b": pair.b}
        if pair.magnitude is not None:
            found[f"{path}.magnitude"] = pair.magnitude
    assert [*map(id, found.values())] == [*map(id, run.parameters)]
    return found


def _starts(run: TrainingRun) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, pair in run.adapter.pairs().items():
        if pair.start is not None:
            found |= {f"{path}.start.a": pair.start[0], f"{path}.start.b": pair.start[1]}
    return found
