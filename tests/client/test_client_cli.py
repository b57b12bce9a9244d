"""The command ``lorax`` against a real server over a fake engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable

import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2

from lorax_serve import __version__
from lorax_serve.cli.client import main
from tests.frontend.toy_tokenizers import WORDS
from tests.server.harness import Harness

Lorax = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest_asyncio.fixture
async def lorax(harness: Harness, capsys: pytest.CaptureFixture[str]) -> Lorax:
    """Run the command; returns its exit code, output and errors."""

    async def run(*arguments: str) -> tuple[int, str, str]:
        address = f"127.0.0.1:{harness.server.port}"
        code = await asyncio.to_thread(main, [*arguments, "--server", address])
        return code, *capsys.readouterr()

    return run


async def test_generate(harness: Harness, lorax: Lorax) -> None:
    assert await lorax("generate", "one two </s>") == (0, " one two\n", "")
    harness.write_adapter("poet")
    await harness.client.load_adapter("poet")
    code, out, err = await lorax(
        *("generate", "one", "--adapter", "poet", "--max-new-tokens", "2", "--seed", "5"),
        *("--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "-v"),
    )
    assert (code, out.split()) == (0, ["one", "one"])
    assert "[poet@" in err
    assert "1 + 2 tokens; max_tokens; seed 5" in err
    sampling = harness.engine.commands[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.9)


async def test_stop_sequences(harness: Harness, lorax: Lorax) -> None:
    code, out, _ = await lorax("generate", "one two three", "--stop", "nine", "--stop", "three")
    assert (code, out.split()) == (0, ["one", "two"])


async def test_prompt_from_standard_input(lorax: Lorax, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one two </s>"))
    assert (await lorax("generate", "-"))[1] == " one two\n"


async def test_generate_through_the_chat_template(harness: Harness, lorax: Lorax) -> None:
    assert (await lorax("generate", "--chat", "one", "--max-new-tokens", "1"))[0] == 0
    words = [WORDS[token] for token in harness.engine.commands[-1].tokens]
    assert words == ["<s>", "user", "one", "</s>", "<s>", "assistant"]


async def test_chat_remembers_the_conversation(
    harness: Harness, lorax: Lorax, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["one", "two"])

    def answer(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    arguments = ("chat", "--system", "seven", "--max-new-tokens", "3")
    assert (await lorax(*arguments))[0] == 0
    last = " ".join(WORDS[token] for token in harness.engine.commands[-1].tokens)
    assert last.startswith("<s> system seven </s> <s> user one </s> <s> assistant")
    assert last.endswith("<s> user two </s> <s> assistant")


async def test_adapters_added_up(
    harness: Harness, lorax: Lorax, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("poet", "pilot"):
        harness.write_adapter(name, name)
        await harness.client.load_adapter(name)
    digests = {each.name: each.digest for each in await harness.client.list_adapters()}
    pinned = f"pilot@{digests['pilot'][:12]}"
    arguments = ("generate", "one", "--max-new-tokens", "1", "--seed", "5", "-v")
    for given, scales in (
        (("poet:0.5", "pilot"), {"poet": 0.5, "pilot": 1}),
        (("poet", f"{pinned}:-1e-1"), {"poet": 1, "pilot": -0.1}),
        (("poet:2",), {"poet": 2}),
        ((f"{pinned}:0",), {"pilot": 0}),
    ):
        flags = [flag for each in given for flag in ("--adapter", each)]
        code, out, err = await lorax(*arguments, *flags)
        assert (code, out.strip()) == (0, "one")
        told = " + ".join(f"{scale:g} x {n}@{digests[n][:12]}" for n, scale in scales.items())
        assert err == f"[{told}; 1 + 1 tokens; max_tokens; seed 5]\n"
        parts = list(harness.engine.composed.values())[-1]
        assert {part.name: part.scale for part in parts} == scales
    count = len(harness.engine.composed)
    code, _, err = await lorax(*arguments, "--adapter", pinned)
    assert (code, err.startswith(f"[{pinned}; ")) == (0, True)
    assert len(harness.engine.composed) == count, "a name without a scale is adapter_id"
    said = iter(["one", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    chat = ("chat", "--max-new-tokens", "1", "--adapter", "poet:0.5", "--adapter", "pilot:3")
    assert (await lorax(*chat))[0] == 0
    assert len(harness.engine.composed) == count + 1


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["poet:loud"], "--adapter poet:loud: 'loud' is no number; write NAME or NAME:SCALE"),
        (["poet:"], "--adapter poet:: '' is no number; write NAME or NAME:SCALE"),
        (["a:b:c"], "--adapter a:b:c: 'c' is no number; write NAME or NAME:SCALE"),
        (["poet", "poet:2"], "--adapter names 'poet' twice; give it one scale"),
        ([":0.5"], "adapters[0].adapter_id is missing: name an adapter"),
        (["poet:nan"], "adapters: scale of 'poet' must be in [-100, 100], found nan"),
        (["poet:101"], "adapters: scale of 'poet' must be in [-100, 100], found 101.0"),
        (["poet", "nobody:1"], "adapter_id 'nobody' is not loaded; loaded: poet"),
    ],
)
async def test_adapters_that_cannot_be_added_up(
    harness: Harness, lorax: Lorax, adapters: list[str], message: str
) -> None:
    harness.write_adapter("poet")
    await harness.client.load_adapter("poet")
    flags = [flag for each in adapters for flag in ("--adapter", each)]
    assert await lorax("generate", "one", *flags) == (1, "", f"lorax: error: {message}\n")


async def test_adapters(harness: Harness, lorax: Lorax) -> None:
    harness.write_adapter("poet")
    code, out, _ = await lorax("adapters", "load", "poet")
    assert code == 0
    assert "poet: version 1, rank 8 on 14 modules" in out
    await lorax("adapters", "load", "pilot", "poet")
    code, out, _ = await lorax("adapters", "list")
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "pilot", "poet"]
    code, out, _ = await lorax("adapters", "unload", "poet")
    assert (code, out) == (0, "poet: unloaded, bytes freed: 1001 of host memory\n")
    assert [adapter.name for adapter in harness.server.adapters] == ["pilot"]


async def test_info(lorax: Lorax) -> None:
    code, out, _ = await lorax("info")
    assert code == 0
    assert "fake (123 parameters)" in out
    assert "float32 on cpu" in out
    assert __version__ in out


async def test_health(harness: Harness, lorax: Lorax) -> None:
    assert await lorax("health") == (0, "serving\n", "")
    await harness.server._report_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    assert await lorax("health") == (1, "not serving\n", "")
    assert not await harness.client.serving()


async def test_errors_are_one_line(lorax: Lorax) -> None:
    code, out, err = await lorax("generate", "one", "--adapter", "nobody")
    assert (code, out) == (1, "")
    assert err == "lorax: error: adapter_id 'nobody' is not loaded; no adapter is loaded\n"
    code, out, err = await lorax("generate", "one", "--top-p", "7")
    assert (code, err.count("\n")) == (1, 1)
    assert "top_p must be in (0, 1]" in err


def test_an_unreachable_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAX_SERVER", "127.0.0.1:1")
    assert main(["info"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lorax: error: 127.0.0.1:1: ")
    assert error.count("\n") == 1


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["adapters"], ["generate"], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"lorax {__version__}\n"
