"""``lorax``: talk to a server from a terminal, and plan for one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from lorax_serve import __version__
from lorax_serve.cli.adapters import add_commands
from lorax_serve.cli.connection import add_connection_flags, connect
from lorax_serve.cli.plan import add_plan
from lorax_serve.errors import InvalidRequest, LoraxError
from lorax_serve.sampling_flags import add_sampling_flags, given_sampling

__all__ = ["main"]

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if it worked, 1 after an error of the server or the request, or if an adapter that was
        inspected would be refused, 130 after Ctrl-C.
    """
    options = _parser().parse_args(argv)
    try:
        if not options.needs_server:
            return options.run(options) or 0
        # What it would print of a connection that fails, our errors say in one line.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        with connect(options) as client:
            return options.run(client, options) or 0
    except LoraxError as error:
        print(f"lorax: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _generate(client: Any, options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.chat:
        prompt = [{"role": "user", "content": prompt}]
    chunks = client.stream(prompt, adapter=_adapters(options), **_sampling(options))
    _show(chunks, options.verbose)


def _chat(client: Any, options: argparse.Namespace) -> None:
    messages = [{"role": "system", "content": options.system}] if options.system else []
    print("An empty line or Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return
        if not said:
            return
        messages.append({"role": "user", "content": said})
        chunks = client.stream(messages, adapter=_adapters(options), **_sampling(options))
        try:
            answer = _show(chunks, options.verbose)
        except KeyboardInterrupt:  # stop this answer, not the chat
            chunks.close()
            messages.pop()
            print(file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": answer})


def _show(chunks: Iterable[Any], verbose: bool) -> str:
    """Print a stream as it comes; returns the text."""
    text, last = "", None
    for last in chunks:
        text += last.text
        print(last.text, end="", flush=True)
    print()
    if verbose and last is not None:
        print(
            f"[{_who(last)}; {last.input_token_count} + {last.generated_token_count} tokens; "
            f"{last.stop_reason.name.lower()}; seed {last.seed}]",
            file=sys.stderr,
        )
    return text


def _who(generation: Any) -> str:
    """Who has answered."""
    if generation.adapter:
        return f"{generation.adapter}@{generation.adapter_digest[:12]}"
    parts = [f"{each.scale:g} x {each.name}@{each.digest[:12]}" for each in generation.adapters]
    return " + ".join(parts) or "the base model"


def _adapters(options: argparse.Namespace) -> Any:
    """What ``--adapter`` names: one as it is, several or one with a scale as a mapping."""
    if not options.adapter:
        return None
    if len(options.adapter) == 1 and ":" not in options.adapter[0]:
        return options.adapter[0]
    scales: dict[str, float] = {}
    for each in options.adapter:
        name, _, scale = each.rpartition(":") if ":" in each else (each, "", "1")
        if name in scales:
            raise InvalidRequest(f"--adapter names {name!r} twice; give it one scale")
        try:
            scales[name] = float(scale)
        except ValueError:
            raise InvalidRequest(
                f"--adapter {each}: {scale!r} is no number; write NAME or NAME:SCALE"
            ) from None
    return scales


def _info(client: Any, options: argparse.Namespace) -> None:
    model = client.model_info()
    print(f"model       {model.model} ({model.num_parameters:,} parameters)")
    print(f"runs in     {model.dtype} on {model.device}")
    print(f"sequences   up to {model.max_sequence_length} tokens")
    print(f"server      lorax-serve {model.server_version}")


def _health(client: Any, _: argparse.Namespace) -> int:
    serving = client.serving()
    print("serving" if serving else "not serving")
    return 0 if serving else 1


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    return given_sampling(options, ("priority",))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorax", description="Talk to a lorax-serve server.")
    parser.add_argument("--version", action="version", version=f"lorax {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    add_connection_flags(common)
    parser.set_defaults(needs_server=True)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", parents=[common], help="generate text")
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument(
        "--chat", action="store_true", help="send it as a user's message through the chat template"
    )
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", parents=[common], help="chat, turn by turn")
    chat.add_argument("--system", help="the system message")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        command.add_argument(
            "--adapter",
            metavar="NAME[:SCALE]",
            action="append",
            help="default: the base model; several are added up, each times its scale (default: 1)",
        )
        command.add_argument(
            "-v", "--verbose", action="store_true", help="say what answered, and how it ended"
        )
        add_sampling_flags(command)
        command.add_argument(
            "--priority",
            type=int,
            help="share of a busy server: -2 to 2, each level doubles it (default: 0)",
            default=argparse.SUPPRESS,
        )
    info = commands.add_parser("info", parents=[common], help="describe the server's model")
    info.set_defaults(run=_info)
    health = commands.add_parser(
        "health", parents=[common], help="whether it takes requests; exit code 1 if not"
    )
    health.set_defaults(run=_health)

    add_commands(commands, common)
    add_plan(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
