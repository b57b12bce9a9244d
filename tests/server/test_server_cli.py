"""The command ``lorax-serve``: where settings come from, and how mistakes are told."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from lorax_serve import __version__
from lorax_serve.cli.serve import main, parse
from lorax_serve.config import EngineConfig, ServerConfig


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (EngineConfig, ServerConfig):
        for field in fields(config):
            monkeypatch.delenv(f"LORAX_{field.name.upper()}", raising=False)


def test_defaults() -> None:
    assert parse([])[0] == ServerConfig()


def test_every_setting_has_a_flag_and_a_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for config in (EngineConfig, ServerConfig):
        for field in fields(config):
            if field.name != "engine":
                assert f"--{field.name.replace('_', '-')} " in text
                assert f"$LORAX_{field.name.upper()})" in text


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAX_MAX_BATCH_SIZE", "7")
    monkeypatch.setenv("LORAX_PORT", "1234")
    monkeypatch.setenv("LORAX_METRICS_PORT", "off")
    monkeypatch.setenv("LORAX_ADAPTERS", "/adapters")
    config, _ = parse(["--port", "99", "--drain-seconds", "1.5"])
    assert config.engine.max_batch_size == 7
    assert (config.port, config.metrics_port, config.drain_seconds) == (99, None, 1.5)
    assert config.adapters == Path("/adapters")


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", "--threads", "2", "--adapters", "/a"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["engine"]["threads"], printed["adapters"]) == (2, "/a")
    assert printed["engine"]["max_sequence_length"] is None


def test_the_place_of_a_manifest_stays_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAX_MANIFEST", "s3://bucket/a.yaml")
    monkeypatch.setenv("LORAX_STATE", "/state")
    assert parse([])[0].manifest == "s3://bucket/a.yaml"
    assert parse(["--manifest", "off"])[0].manifest is None
    assert main(["--print-config", "--manifest", "s3://bucket/b/c.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"] == "s3://bucket/b/c.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "many"], "port must be a whole number, found 'many'"),
        (["--max-batch-size", "0"], "max_batch_size must be at least 1, found 0"),
        (["--dtype", "int8"], "dtype must be one of auto"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--log-level", "loud"], "invalid choice: 'loud'"),
        (["--adapters", "/no/such/directory"], "adapters: no such directory"),
        (
            ["--manifest", "https://a/b.yaml", "--state", "/dev/null/state"],
            "manifest https://...: is read from a file or a bucket only; give --manifest PATH or",
        ),
        (
            ["--manifest", "s3://bucket", "--state", "/dev/null/state"],
            "manifest s3://bucket: names no file in the bucket; give s3://bucket/path",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *([] if "--port" in arguments else ["--port", "0"])]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("lorax-serve: error: ")
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_wrong_variables_are_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What Kubernetes sets for a Service that is called "lorax".
    monkeypatch.setenv("LORAX_PORT", "tcp://10.0.0.1:50051")
    assert main([]) == 2
    assert "port must be a whole number, found 'tcp://10.0.0.1:50051'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"lorax-serve {__version__}\n"
