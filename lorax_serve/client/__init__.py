"""A client for lorax-serve, synchronous and asynchronous. Imports neither torch nor transformers.

::

    with Client("localhost:50051") as client:
        print(client.generate("Once upon a time", adapter="poet", temperature=0.7).text)
        for chunk in client.stream([{"role": "user", "content": "Hi"}], adapter="poet"):
            print(chunk.text, end="")

Every failure is a ``LoraxError``; those that the server raises come back as themselves.
"""

from lorax_serve.client.aio import AsyncClient
from lorax_serve.client.failures import ServerError, TimedOut, Unavailable
from lorax_serve.client.requests import Adapters, GenerateOptions, Prompt
from lorax_serve.client.results import (
    Adapter,
    AdapterEvent,
    AppliedAdapter,
    FailedAdapter,
    Generation,
    Model,
    Token,
    Tokens,
    TopToken,
)
from lorax_serve.client.sync import Client
from lorax_serve.client.tls import Tls
from lorax_serve.core import Freed, StopReason
from lorax_serve.report import LoadReport, ModuleReport, ProbeOutcome, ProbeReport

__all__ = [
    "Adapter",
    "AdapterEvent",
    "Adapters",
    "AppliedAdapter",
    "AsyncClient",
    "Client",
    "FailedAdapter",
    "Freed",
    "GenerateOptions",
    "Generation",
    "LoadReport",
    "Model",
    "ModuleReport",
    "ProbeOutcome",
    "ProbeReport",
    "Prompt",
    "ServerError",
    "StopReason",
    "TimedOut",
    "Tls",
    "Token",
    "Tokens",
    "TopToken",
    "Unavailable",
]
