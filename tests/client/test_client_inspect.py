"""``lorax adapters inspect``, from a server and from files."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorax_serve.adapter import CONFIG_FILE
from lorax_serve.cli.client import main
from tests.server.harness import Harness
from tests.server.test_server_report import FULL

MakeAdapter = Callable[..., Path]


@pytest.fixture
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter(
        "poet",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 16},
        modules_to_save=["lm_head"],
    )


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_good_directory(
    adapter: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("LORAX_SERVER", raising=False)
    assert main(["adapters", "inspect", str(adapter), "--model", str(tiny_model)]) == 0
    out = lines(capsys)
    assert ["linear", "4", "8", "2", "4", "q_proj,", "down_proj"] in out
    assert ["linear", "16", "8", "0.5", "2", "v_proj"] in out
    assert ["output", "-", "-", "-", "1", "lm_head"] in out
    assert ["tensors", "13", "matched,", "0", "unmatched,", "0", "missing"] in out
    assert ["variants", "lora,", "modules_to_save"] in out
    assert out[-1] == ["it", "would", "be", "applied"]


def test_a_bad_directory(
    adapter: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    config["rank_pattern"] = {}
    config["target_modules"].append("o_proj")
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    assert main(["adapters", "inspect", str(adapter), "--local", "--model", str(tiny_model)]) == 1
    out = capsys.readouterr().out
    assert "13 matched, 0 unmatched, 4 missing" in out
    assert "missing: base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight" in out
    assert "problem: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight has rank" in out
    assert out.endswith("it would be refused: missing_tensor\n")


def test_no_server_and_a_directory(
    adapter: Path,
    embedded_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The embedded model is another one than the adapter's."""
    monkeypatch.setenv("LORAX_SERVER", "127.0.0.1:1")
    assert main(["adapters", "inspect", str(adapter)]) == 1
    captured = capsys.readouterr()
    assert "looking at the files here" in captured.err
    assert "it would be refused" in captured.out
    assert main(["adapters", "inspect", "nowhere"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


async def test_a_server(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    async def inspect(path: str) -> tuple[int, str]:
        address = f"127.0.0.1:{harness.server.port}"
        arguments = ["adapters", "inspect", path, "--server", address]
        return await asyncio.to_thread(main, arguments), capsys.readouterr().out

    harness.write_adapter("poet")
    code, out = await inspect("poet")
    assert (code, "digest    poet" in out) == (0, True)
    assert (await inspect("./poet/"))[0] == 0
    harness.engine.report = FULL
    code, out = await inspect("poet")
    assert code == 1
    assert "probe     failed: difference 0.5, tolerance 0.25, effect 3" in out
    assert "warning: look" in out
    assert out.endswith("problem: one\nproblem: two\nit would be refused: probe_failed\n")


def test_asking_a_server_imports_nothing_heavy() -> None:
    script = (
        "import sys, lorax_serve.cli.inspection\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
