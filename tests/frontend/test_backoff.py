"""Failures are told again, for longer each time, and forgotten in the end."""

from __future__ import annotations

import pytest

from lorax_serve.errors import AdapterNotFound
from lorax_serve.frontend.backoff import Backoff


def test_each_failure_is_left_alone_twice_as_long() -> None:
    now = 0.0
    backoff = Backoff(lambda: now)
    error = AdapterNotFound("gone")
    backoff.check("poet")
    assert [backoff.failed("poet", error) for _ in range(10)] == [
        1, 2, 4, 8, 16, 32, 64, 128, 256, 300
    ]  # fmt: skip
    with pytest.raises(AdapterNotFound, match="gone"):
        backoff.check("poet")
    backoff.check("pilot")
    now = 300.0
    backoff.check("poet")
    assert backoff.failed("poet", error) == 300
    backoff.succeeded("poet")
    assert backoff.failed("poet", error) == 1


def test_names_from_requests_do_not_fill_the_memory() -> None:
    backoff = Backoff(lambda: 0.0)
    for number in range(5000):
        backoff.failed(str(number), AdapterNotFound(str(number)))
    backoff.check("0")
    with pytest.raises(AdapterNotFound):
        backoff.check("4999")
