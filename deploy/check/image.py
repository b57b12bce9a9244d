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


class _Images:
    """A store of images of its own, which leaves nothing behind.

    Args:
        place: an empty directory.
    """

    def __init__(self, place: Path) -> None:
        store = [f"--root={place / 'root'}", f"--runroot={place / 'run'}", "--storage-driver=vfs"]
        self._archive = place / "base.tar"
        self._buildah = ["buildah", *store]
        self._podman = ["podman", *store, "--cgroup-manager=cgroupfs", "--runtime=runc"]

    def build(self) -> None:
        """Make the base and the image."""
        include = "--include=python3,python3-venv,ca-certificates"
        _run("mmdebstrap", "--variant=minbase", include, "bookworm", str(self._archive))
        _run(*self._podman, "import", str(self._archive), _BASE)
        words = [*self._buildah, "build", "--isolation=chroot", "--format=docker"]
        # What pip is told of this machine holds in the build, too: it reaches the same packages.
        for variable in ("PIP_CERT", "PIP_FIND_LINKS"):
            if place := os.environ.get(variable):
                words += ["--build-arg", f"{variable}={place}", "--volume", f"{place}:{place}:ro"]
        words += ["--build-arg", f"BASE={_BASE}", "--file=deploy/docker/Dockerfile"]
        _run(*words, f"--tag={_IMAGE}", ".")

    def answer(self) -> str:
        """What the server in the image answers; it goes on."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        _run(
            *(*self._podman, "run", "--detach", f"--name={_NAME}", "--network=host"),
            *("--no-healthcheck", "--read-only", "--tmpfs=/tmp", "--cap-drop=all"),
            *("--security-opt=no-new-privileges", f"--ulimit=nofile={files}:{files}"),
            *("--ulimit=nproc=4096:4096", _IMAGE, "--device=cpu", "--kernels=compiled"),
            *("--state=/state/lorax", "--metrics-port=off", "--host=127.0.0.1"),
            f"--port={_SERVER.partition(':')[2]}",
        )
        inside = (*self._podman, "exec", _NAME, "lorax")
        deadline = time.monotonic() + _START_SECONDS
        while subprocess.run([*inside, "health", "--server", _SERVER], check=False).returncode:
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not get ready")
            time.sleep(2)
        return _run(*inside, "generate", "Once upon a time", "--server", _SERVER)

    def stop(self) -> int:
        """Stop the server as Kubernetes does; returns its exit code."""
        _run(*self._podman, "stop", "--time=60", _NAME)
        return int(_run(*self._podman, "inspect", "--format={{.State.ExitCode}}", _NAME))

    def log(self) -> None:
        """Print what the server has said."""
        subprocess.run([*self._podman, "logs", _NAME], check=False)

    def remove(self) -> None:
        """End the server, whatever happened, and let go of what is mounted."""
        subprocess.run([*self._podman, "rm", "--force", "--ignore", _NAME], check=False)


def main() -> int:
    """Build, serve, stop; returns the exit code."""
    if reason := _skip():
        print(json.dumps({"skipped": reason}))
        return 0
    with tempfile.TemporaryDirectory(prefix="lorax-image-") as place:
        images = _Images(Path(place))
        began = time.monotonic()
        images.build()
        built = time.monotonic()
        try:
            text, code = images.answer(), images.stop()
        except (subprocess.CalledProcessError, TimeoutError):
            images.log()
            raise
        finally:
            images.remove()
    seconds = round(built - began)
    print(json.dumps({"build_seconds": seconds, "exit_code": code, "answer": text[:80]}))
    return 0 if text and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
