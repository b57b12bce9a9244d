"""Build the image and serve with it as Kubernetes would: no root, no capability, nothing writable.

The base image is made of Debian's packages, so that no registry of images is needed. The last line
is one of JSON: the figures, or why nothing could be done.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploy.check.helm import ROOT

_TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
_STORAGE = ("--storage-driver", "vfs")
_PODMAN = ("podman", *_STORAGE, "--cgroup-manager=cgroupfs", "--runtime=runc")
_BASE, _IMAGE, _NAME = "localhost/lorax-base", "localhost/lorax-serve:check", "lorax-image-check"
_SERVER = "127.0.0.1:50951"
_START_SECONDS = 600


def _skip() -> str | None:
    """Why it cannot be done here."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install {' '.join(missing)}"
    return None if os.geteuid() == 0 else "needs root, to build without a daemon"


def _run(*words: str) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def _make_base() -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = str(Path(folder) / "base.tar")
        include = "--include=python3,python3-venv,ca-certificates"
        _run("mmdebstrap", "--variant=minbase", include, "bookworm", archive)
        _run(*_PODMAN, "import", archive, _BASE)


def _build() -> None:
    words = ["buildah", *_STORAGE, "build", "--isolation=chroot", "--format=docker"]
    # What pip is told of this machine holds in the build, too: it reaches the same packages.
    for variable in ("PIP_CERT", "PIP_FIND_LINKS"):
        if place := os.environ.get(variable):
            words += ["--build-arg", f"{variable}={place}", "--volume", f"{place}:{place}:ro"]
    words += ["--build-arg", f"BASE={_BASE}", "--file=deploy/docker/Dockerfile", f"--tag={_IMAGE}"]
    _run(*words, ".")


def _serve() -> str:
    """What the server in the image answers."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    subprocess.run([*_PODMAN, "rm", "--force", "--ignore", _NAME], check=True)
    _run(
        *(*_PODMAN, "run", "--detach", f"--name={_NAME}", "--network=host", "--no-healthcheck"),
        *("--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges"),
        *(f"--ulimit=nofile={files}:{files}", "--ulimit=nproc=4096:4096", _IMAGE),
        *("--device=cpu", "--kernels=compiled", "--state=/state/lorax", "--metrics-port=off"),
        *("--host=127.0.0.1", f"--port={_SERVER.partition(':')[2]}"),
    )
    inside = (*_PODMAN, "exec", _NAME, "lorax")
    deadline = time.monotonic() + _START_SECONDS
    while subprocess.run([*inside, "health", "--server", _SERVER], check=False).returncode:
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not get ready")
        time.sleep(2)
    return _run(*inside, "generate", "Once upon a time", "--server", _SERVER)


def main() -> int:
    """Build, serve, stop; returns the exit code."""
    if reason := _skip():
        print(json.dumps({"skipped": reason}))
        return 0
    began = time.monotonic()
    _make_base()
    _build()
    built = time.monotonic()
    try:
        text = _serve()
        _run(*_PODMAN, "stop", "--time=60", _NAME)
        code = _run(*_PODMAN, "inspect", "--format={{.State.ExitCode}}", _NAME)
    except (subprocess.CalledProcessError, TimeoutError):
        subprocess.run([*_PODMAN, "logs", _NAME], check=False)
        raise
    finally:
        subprocess.run([*_PODMAN, "rm", "--force", "--ignore", _NAME], check=False)
    seconds = round(built - began)
    print(json.dumps({"build_seconds": seconds, "exit_code": int(code), "answer": text[:80]}))
    return 0 if text and code == "0" else 1


if __name__ == "__main__":
    sys.exit(main())
