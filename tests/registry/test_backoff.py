"""Failures are told again, for longer each time, and forgotten in the end."""

from __future__ import annotations

import gc
import weakref

import pytest

from lorax_serve.errors import AdapterNotFound
from lorax_serve.registry.backoff import Backoff


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


def test_what_led_to_an_error_is_not_kept() -> None:
    class Client:
        pass

    def call() -> weakref.ref[Client]:
        client = Client()
        try:
            raise OSError(client)
        except OSError as error:
            try:
                raise AdapterNotFound("gone") from error
            except AdapterNotFound as gone:
                backoff.failed("poet", gone)
        return weakref.ref(client)

    backoff = Backoff()
    client = call()
    gc.collect()
    assert client() is None


def test_an_error_that_is_told_often_does_not_grow() -> None:
    backoff = Backoff(lambda: 0.0)
    backoff.failed("poet", AdapterNotFound("gone"))
    lengths = set()
    for _ in range(3):
        with pytest.raises(AdapterNotFound) as caught:
            backoff.check("poet")
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1


def test_names_from_requests_do_not_fill_the_memory() -> None:
    backoff = Backoff(lambda: 0.0)
    for number in range(5000):
        backoff.failed(str(number), AdapterNotFound(str(number)))
    backoff.check("0")
    with pytest.raises(AdapterNotFound):
        backoff.check("4999")
