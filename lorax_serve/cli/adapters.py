"""``lorax adapters``: administration from a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from typing import Any

from lorax_serve.cli.table import table

__all__ = ["add_commands"]

_SECONDS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


def _list(client: Any, options: argparse.Namespace) -> None:
    found = client.list_adapters()
    rows = [
        (
            each.name,
            each.state + (", pinned" if each.pinned else ""),
            each.tier or "",
            str(each.version),
            str(each.rank),
            str(each.host_bytes),
            str(each.weight),
            str(each.active_requests),
            str(each.total_requests),
            _ago(each.last_used),
            each.digest[:12],
        )
        for each in found
    ]
    head = "NAME STATE TIER VERSION RANK BYTES WEIGHT ACTIVE REQUESTS USED DIGEST"
    print("\n".join(table([tuple(head.split()), *rows])))
    for failed in client.list_failed_adapters():
        print(f"not loaded: {failed.name}: {failed.message}")


def _load(client: Any, options: argparse.Namespace) -> None:
    _show(
        client.load_adapter(
            options.name, options.path, weight=options.weight, pinned=options.pinned
        )
    )


def _upload(client: Any, options: argparse.Namespace) -> None:
    _show(
        client.upload_adapter(
            options.name, options.directory, weight=options.weight, pinned=options.pinned
        )
    )


def _update(client: Any, options: argparse.Namespace) -> None:
    adapter = client.update_adapter(options.name, weight=options.weight, pinned=options.pinned)
    pinned = "pinned" if adapter.pinned else "not pinned"
    print(f"{adapter.name}: weight {adapter.weight}, {pinned}")


def _show(adapter: Any) -> None:
    print(
        f"{adapter.name}: version {adapter.version}, rank {adapter.rank} on "
        f"{adapter.module_count} modules, {adapter.host_bytes} bytes, digest {adapter.digest}"
    )
    for warning in adapter.report.warnings if adapter.report else ():
        print(f"lorax: warning: {warning}", file=sys.stderr)


def _inspect(client: Any, options: argparse.Namespace) -> int:
    from lorax_serve.cli.inspection import inspect

    return inspect(client, options)


def _rollback(client: Any, options: argparse.Namespace) -> None:
    adapter = client.roll_back_adapter(options.name, options.digest)
    print(f"{adapter.name}: version {adapter.version}, digest {adapter.digest}")


def _unload(client: Any, options: argparse.Namespace) -> None:
    freed = client.unload_adapter(options.name)
    tiers = {"of host memory": freed.host, "on the device": freed.device, "on disk": freed.disk}
    bytes_by_tier = ", ".join(f"{nbytes} {where}" for where, nbytes in tiers.items() if nbytes)
    print(f"{options.name}: unloaded, bytes freed: {bytes_by_tier or 'none'}")


def _watch(client: Any, options: argparse.Namespace) -> None:
    for event in client.watch_adapters(options.name):
        what = [time.strftime("%H:%M:%S"), event.kind, event.name]
        if event.adapter is not None:
            each = event.adapter
            state = each.state + (", pinned" if each.pinned else "")
            what += [state, f"version {each.version}", f"weight {each.weight}", each.digest[:12]]
        if event.message:
            what.append(f"{event.reason}: {event.message}" if event.reason else event.message)
        print("  ".join(filter(None, what)), flush=True)


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``adapters`` and its actions to the parser of ``lorax``.

    Args:
        commands: the sub-parsers.
        common: flags of every action.
    """
    adapters = commands.add_parser("adapters", help="list, load, upload, watch and unload adapters")
    actions = adapters.add_subparsers(required=True, metavar="ACTION")
    name = argparse.ArgumentParser(add_help=False)
    name.add_argument("name", help="what requests call it")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--weight", type=int, help="its share of a busy server, 1 to 100")
    settings.add_argument(
        "--pinned",
        action=argparse.BooleanOptionalAction,
        help="whether its weights never leave host memory for others",
    )

    def add(word: str, run: Any, text: str, *parents: argparse.ArgumentParser) -> Any:
        action = actions.add_parser(word, parents=[*parents, common], help=text)
        action.set_defaults(run=run)
        return action

    add("list", _list, "what is loaded")
    load = add("load", _load, "load or replace an adapter", name, settings)
    load.add_argument("path", nargs="?", help="inside the server's --adapters (default: the name)")
    upload = add("upload", _upload, "send an adapter's files and load them", name, settings)
    upload.add_argument("directory", help="here; the server keeps its files (--state)")
    add("update", _update, "change the weight or the pin", name, settings)
    rollback = add("rollback", _rollback, "make a name mean an earlier version again", name)
    rollback.add_argument("digest", nargs="?", help="of that version (default: the one before)")
    inspect = add("inspect", _inspect, "what a load would find, without loading")
    inspect.add_argument(
        "path",
        help="inside the server's --adapters; without --server, a directory here if there is one",
    )
    inspect.add_argument(
        "--local", action="store_true", help="look at a directory here, without a server"
    )
    inspect.add_argument(
        "--model",
        help="of --local, which it implies: as of lorax-serve (default: smollm2-135m)",
    )
    add("unload", _unload, "drain and free an adapter", name)
    watch = add("watch", _watch, "what is loaded, then every change")
    watch.add_argument("name", nargs="?", help="the only adapter to tell of (default: all)")


def _ago(when: datetime) -> str:
    seconds = max(0, int((datetime.now(UTC) - when).total_seconds()))
    unit, size = next((each for each in _SECONDS.items() if seconds >= each[1]), ("s", 1))
    return f"{seconds // size} {unit} ago"
