"""The Dockerfile: what it says of variables, ports and the user is what the others rely on."""

from __future__ import annotations

import re

import pytest

from deploy.check import helm
from lorax_serve.cli import client, serve

TEXT = (helm.ROOT / "deploy" / "docker" / "Dockerfile").read_text()
FINAL = TEXT.split("\nFROM base\n")[1]


def test_the_images_variables_are_no_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(re.findall(r"(LORAX_\w+)=(\S+)", FINAL))
    assert "LORAX_CACHE" in variables
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config, _ = serve.parse([])
    ports = re.search(r"^EXPOSE (\d+) (\d+)$", FINAL, re.MULTILINE)
    assert ports is not None
    assert ports.groups() == (str(config.port), str(config.metrics_port))


def test_it_runs_as_the_charts_user_without_a_shell() -> None:
    assert re.search(r"^USER 10001:10001$", FINAL, re.MULTILINE)
    assert "runAsUser: 10001" in (helm.CHART / "templates" / "_names.tpl").read_text()
    assert FINAL.rstrip().endswith('ENTRYPOINT ["lorax-serve"]')


def test_the_health_check_is_a_command_of_the_client() -> None:
    found = re.search(r"HEALTHCHECK .* CMD \[(.*)\]", FINAL)
    assert found is not None
    program, *words = re.findall(r'"([^"]+)"', found[1])
    assert program == "lorax"
    client._parser().parse_args(words)
