"""``lorax-serve``: settings from flags and environment, then the server until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lorax_serve import __version__
from lorax_serve.cli.flags import add_flags, from_environment, read_value
from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.errors import InvalidRequest, LoraxError

__all__ = ["main", "parse"]

_LEVELS = ("debug", "info", "warning", "error")
# Adapters that are described at the start; there may be thousands.
_SHOWN = 16


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 after SIGTERM or Ctrl-C and a drain, 1 if the engine died, 2 if it could not start, 130
        after a second Ctrl-C.
    """
    try:
        config, options = parse(argv)
        if options.print_config:
            print(json.dumps(dataclasses.asdict(config), indent=2, default=str))
            return 0
        logging.basicConfig(
            level=options.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        # Heavy imports only now, so that --help and a wrong flag answer at once.
        from lorax_serve.server.app import Server
        from lorax_serve.server.run import run

        def ready(server: Server) -> None:
            _report(server, config)

        return asyncio.run(run(config, ready))
    except KeyboardInterrupt:  # a second Ctrl-C does not wait for the running requests
        return 130
    except LoraxError as error:
        print(f"lorax-serve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None = None) -> tuple[ServerConfig, argparse.Namespace]:
    """Settings from ``argv``, else from ``LORAX_*`` variables, else the defaults.

    Raises:
        InvalidRequest: naming the flag.
    """
    parser = _Parser(
        prog="lorax-serve",
        description="Serve one base model and many LoRA adapters over gRPC.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lorax-serve {__version__}")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings as JSON and exit"
    )
    parser.add_argument("--log-level", choices=_LEVELS, default="warning")
    for title, settings in (("server", ServerConfig), ("engine", EngineConfig)):
        add_flags(parser.add_argument_group(title), settings)  # type: ignore[arg-type]
    options = parser.parse_args(argv)
    given = vars(options)
    server, engine = (
        read_value(kind, from_environment(kind) | _flags_of(kind, given))
        for kind in (ServerConfig, EngineConfig)
    )
    return ServerConfig(engine=EngineConfig(**engine), **server), options


def _flags_of(settings: type[ServerConfig | EngineConfig], given: dict[str, str]) -> dict[str, str]:
    names = {spec.name for spec in dataclasses.fields(settings)}
    return {name: text for name, text in given.items() if name in names}


def _report(server: object, config: ServerConfig) -> None:
    from lorax_serve.server.app import Server

    assert isinstance(server, Server)
    info = server.info
    lines = [
        f"model     {info.model} ({info.num_parameters / 1e6:.0f} M parameters, {info.dtype} on "
        f"{info.device})",
        f"limits    {info.max_sequence_length} tokens a sequence, "
        f"{info.max_batch_size} sequences at once, "
        f"KV cache up to {info.kv_cache_bytes / 1e9:.2f} GB",
    ]
    lines += [
        f"adapter   {adapter.name}: rank {adapter.info.max_rank} on "
        f"{adapter.info.num_modules} modules, {adapter.info.nbytes / 1e6:.1f} MB, "
        f"digest {adapter.info.digest[:12]}"
        for adapter in server.adapters[:_SHOWN]
    ]
    if len(server.adapters) > _SHOWN:
        lines.append(f"          and {len(server.adapters) - _SHOWN} more adapters")
    lines += [f"refused   {name}: {error}" for name, error in server.refused.items()]
    lines.append(f"gRPC      {config.host}:{server.port}")
    if server.metrics_port is not None:
        lines.append(f"metrics   http://{config.host}:{server.metrics_port}/metrics")
    adapters = server.adapters
    choice = f" --adapter {adapters[0].name}" if adapters else ""
    place = "" if server.port == 50051 else f" --server localhost:{server.port}"
    lines.append(f'ready: try  lorax generate{place}{choice} "Once upon a time"')
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
