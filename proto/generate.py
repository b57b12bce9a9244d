"""Generate the Python stubs from the .proto files: ``python proto/generate.py [--check]``.

Writes ``lorax_serve/pb/lorax/v1``; with ``--check`` it writes nothing and exits with 1 if the
committed stubs are not what it would write. Needs grpcio-tools. The stubs ask for at least the
grpcio and protobuf that they were made with: raise the bounds in pyproject.toml with them.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

PROTO = Path(__file__).resolve().parent
PACKAGE = PROTO.parent / "lorax_serve" / "pb"
KINDS = ("python", "pyi", "grpc_python")


def generate(target: Path) -> None:
    """Write the stubs of all .proto files under ``target``."""
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    # The well-known types come with grpcio-tools.
    includes = [f"-I{PROTO}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    outputs = [f"--{kind}_out={target}" for kind in KINDS]
    if protoc.main(["protoc", *includes, *outputs, *sources]) != 0:
        raise SystemExit("protoc failed: its messages are above")
    for stub in target.rglob("*.py*"):
        # protoc imports by the path of the .proto file; our stubs live in a package of their own.
        text = re.sub(r"^from lorax\.", "from lorax_serve.pb.lorax.", stub.read_text(), flags=re.M)
        # mypy reads .pyi files even where it is told to skip a package.
        header = "# mypy: ignore-errors\n" if stub.suffix == ".pyi" else ""
        stub.write_text(header + text)


def main() -> int:
    """Generate or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if they differ")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory)
        generate(made)
        wanted = {str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*_pb2*")}
    found = {
        str(path.relative_to(PACKAGE)): path.read_bytes()
        for path in PACKAGE.rglob("*_pb2*.py*")
        if path.suffix != ".pyc"
    }
    if check:
        stale = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        for name in stale:
            print(f"lorax_serve/pb/{name} is stale: run 'python proto/generate.py'")
        return 1 if stale else 0
    for name in found.keys() - wanted.keys():
        (PACKAGE / name).unlink()
    for name, content in wanted.items():
        (PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (PACKAGE / name).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
