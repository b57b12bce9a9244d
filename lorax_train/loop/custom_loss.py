"""A loss function of the user's own, by the name that it is imported by, and tried out before
anything is trained with it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lorax_serve.errors import TrainingError
from lorax_train.loop.loss import LossFunction

__all__ = ["load_loss", "try_loss"]

_TRIED_TARGETS = 5


def load_loss(where: str) -> LossFunction:
    """Import ``module:function``, or ``file.py:function``; this runs the module's code.

    Raises:
        TrainingError: naming what is missing, or what the code raised.
    """
    source, _, name = where.rpartition(":")
    if not source or not name:
        raise TrainingError(
            f"--loss {where}: give module:function, or file.py:function, such as losses.py:smooth"
        )
    module = _from_file(where, Path(source)) if source.endswith(".py") else _named(where, source)
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if _is_own_function(module, value)]
        raise TrainingError(
            f"--loss {where}: {source} has no {name} (its functions: {', '.join(known) or 'none'})"
        )
    if not callable(function):
        raise TrainingError(f"--loss {where}: {name} is {type(function).__name__}, not a function")
    found: LossFunction = function
    return found


def try_loss(where: str, function: LossFunction, vocabulary: int, device: torch.device) -> None:
    """Call a loss function once on random logits, and look at what comes back.

    Args:
        where: its name in messages.
        function: must turn logits ``[n, vocabulary]`` float32 and labels ``[n]`` int64 into the
            loss of each target ``[n]``, each of which depends on its own logits and label alone.
        vocabulary: of the model.
        device: that it will be called on.

    Raises:
        TrainingError: saying what is wrong with it.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_TRIED_TARGETS, vocabulary, generator=generator).to(device)
    labels = torch.randint(vocabulary, (_TRIED_TARGETS,), generator=generator).to(device)
    whole, slope = _call(where, function, logits, labels)
    if not bool(whole.isfinite().all()):
        raise TrainingError(f"--loss {where}: a loss of random logits is not a finite number")
    if not bool(slope.isfinite().all()):
        raise TrainingError(f"--loss {where}: its gradient is not a finite number")
    if not bool(slope.any()):
        raise TrainingError(f"--loss {where}: its gradient is 0, so nothing can be learned from it")
    alone, _ = _call(where, function, logits[:1], labels[:1])
    if not torch.allclose(whole[:1], alone, rtol=1e-4, atol=1e-6):
        raise TrainingError(
            f"--loss {where}: the loss of a target depends on the other targets; it is called on "
            "any part of a batch, so it must be each target's own (reduction='none'; no mean)"
        )


def _call(
    where: str, function: LossFunction, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, and the gradient of their sum for the logits."""
    logits = logits.clone().requires_grad_()
    try:
        losses: Any = function(logits, labels.clone())
    except Exception as error:  # the user's code may raise anything
        raise TrainingError(
            f"--loss {where}: called with logits {list(logits.shape)} and labels "
            f"{list(labels.shape)}, it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(losses, torch.Tensor):
        raise TrainingError(
            f"--loss {where}: it must return a tensor with the loss of each target, not "
            f"{type(losses).__name__}"
        )
    if losses.shape != labels.shape or not losses.is_floating_point():
        raise TrainingError(
            f"--loss {where}: it must return one loss for each target, floating point "
            f"{list(labels.shape)}, not {losses.dtype} {list(losses.shape)}"
            + ("; do not take the mean (reduction='none')" if losses.ndim == 0 else "")
        )
    if not losses.requires_grad:
        raise TrainingError(f"--loss {where}: no gradient flows from its losses to the logits")
    try:
        (slope,) = torch.autograd.grad(losses.sum(), logits)
    except RuntimeError as error:
        raise TrainingError(f"--loss {where}: its gradient cannot be computed: {error}") from error
    return losses.detach(), slope


def _from_file(where: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise TrainingError(f"--loss {where}: there is no file {path}")
    # Under a name that no import finds: it must not hide a module.
    spec = importlib.util.spec_from_file_location(f"lorax_train_loss_{path.stem}", path)
    assert spec is not None  # its name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look themselves up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[spec.name]
        raise TrainingError(
            f"--loss {where}: {path} raised {type(error).__name__}: {error}"
        ) from error
    return module


def _named(where: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = ""
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            hint = "; install it, set PYTHONPATH, or give its file as file.py:function"
        raise TrainingError(f"--loss {where}: {error}{hint}") from error
    except Exception as error:  # the user's code may raise anything
        raise TrainingError(
            f"--loss {where}: importing {name} raised {type(error).__name__}: {error}"
        ) from error


def _is_own_function(module: ModuleType, value: object) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
