"""What ``make deploy-check`` says of the proto files: changes that break clients are refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.check import helm

BUF = helm.TOOLS / "buf"
PROTO = helm.ROOT / "proto"
needs_buf = pytest.mark.skipif(not BUF.exists(), reason="there is no buf: make deploy-tools")


def breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BUF), "breaking", "--against", str(PROTO / "released.binpb")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@needs_buf
def test_nothing_is_broken() -> None:
    done = breaking(PROTO)
    assert done.returncode == 0, done.stdout


@needs_buf
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("adapter_id = 4", "adapter_id = 9", 'field "4" with name "adapter_id"'),
        ("string adapter_id = 4", "int32 adapter_id = 4", "changed type"),
        ("string adapter_id = 4", "string adapter = 4", "changed name"),
        ("  rpc Tokenize(TokenizeRequest) returns (TokenizeResponse);", "", 'RPC "Tokenize"'),
        ("service GenerationService", "service TextService", 'service "GenerationService"'),
    ],
)
def test_what_breaks_clients_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    shutil.copytree(PROTO, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "lorax" / "v1" / "generation.proto"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    done = breaking(tmp_path)
    assert done.returncode != 0
    assert message in done.stdout
