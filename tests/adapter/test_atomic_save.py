"""A save that fails or is killed anywhere leaves one adapter whole."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.adapter import LoRAConfig, read, save, undo_broken_save

CONFIGS = {alpha: LoRAConfig(r=2, lora_alpha=alpha, target_modules=("q_proj",)) for alpha in (4, 8)}
NAME = "base_model.model.q_proj.lora_A.weight"


def write(directory: Path, alpha: int, value: float) -> None:
    save(directory, CONFIGS[alpha], {NAME: torch.full((2, 8), value)}, card=f"card {value}")


def seen(directory: Path) -> tuple[float, float]:
    files = read(directory)
    return files.config.lora_alpha, files.tensors[NAME][0, 0].item()


def failing_at(number: int, act: Callable[[], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Do ``act`` in place of the system call of that number, of those that change the disk."""

    def install(patch: pytest.MonkeyPatch) -> None:
        count = 0

        def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    act()
                return real(*args, **options)

            return call

        patch.setattr(os, "fsync", wrap(os.fsync))
        for name in ("replace", "unlink", "open"):
            patch.setattr(Path, name, wrap(getattr(Path, name)))

    return install


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("alpha", [4, 8])
def test_a_disk_that_is_full_at_any_call_leaves_the_old_adapter_whole(
    alpha: int, tmp_path: Path
) -> None:
    for number in range(1, 100):
        write(tmp_path, 4, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            failing_at(number, full)(patch)
            try:
                write(tmp_path, alpha, 2.0)
            except OSError:
                outcome = "failed"
            else:
                outcome = "done"
        # An error after the last rename, in cleaning up, comes too late to undo anything.
        assert seen(tmp_path) in ((4, 1.0), (alpha, 2.0))
        if outcome == "done":
            assert seen(tmp_path) == (alpha, 2.0)
            assert number > 8
            return
    pytest.fail("no call was the last")


@pytest.mark.parametrize("alpha", [4, 8])
def test_a_process_killed_at_any_call_leaves_an_adapter_that_is_whole(
    alpha: int, tmp_path: Path
) -> None:
    for number in range(1, 100):
        write(tmp_path, 4, 1.0)
        child = os.fork()
        if child == 0:
            failing_at(number, die)(pytest.MonkeyPatch())
            write(tmp_path, alpha, 2.0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        undo_broken_save(tmp_path)
        assert seen(tmp_path) in ((4, 1.0), (alpha, 2.0))
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        if not os.WIFSIGNALED(status):
            assert seen(tmp_path) == (alpha, 2.0)
            assert number > 8
            return
    pytest.fail("no call was the last")


def test_a_first_save_that_is_killed_leaves_what_is_known_for_unfinished(tmp_path: Path) -> None:
    for number in range(1, 100):
        root = tmp_path / str(number)
        child = os.fork()
        if child == 0:
            failing_at(number, die)(pytest.MonkeyPatch())
            write(root, 4, 1.0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        undo_broken_save(root)
        left = {path.name for path in root.iterdir()}
        assert not left or "adapter_config.json" in left
        if not os.WIFSIGNALED(status):
            assert seen(root) == (4, 1.0)
            return
    pytest.fail("no call was the last")


def test_with_the_same_config_there_is_an_adapter_at_every_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 4, 1.0)
    instants = 0

    def look() -> None:
        nonlocal instants
        instants += 1
        assert (tmp_path / "adapter_config.json").is_file()
        assert (tmp_path / "adapter_model.safetensors").is_file()

    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        look()
        result = real(self, target)
        look()
        return result

    monkeypatch.setattr(Path, "replace", replace)
    write(tmp_path, 4, 2.0)
    assert seen(tmp_path) == (4, 2.0)
    assert instants == 6
