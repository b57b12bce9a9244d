"""``lorax plan``: how large a deployment must be, from the model's config and no weights."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_serve.cli.table import table
from lorax_serve.errors import InvalidRequest, ModelUnsupported

if TYPE_CHECKING:
    from lorax_serve.cli.capacity import Capacity

__all__ = ["add_plan"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def add_plan(commands: Any) -> None:
    """Add ``plan`` to the parser of ``lorax``."""
    parser = commands.add_parser("plan", help="size a deployment, without a server")
    parser.set_defaults(run=run, needs_server=False)
    add = parser.add_argument
    add("--model", required=True, help="as of lorax-serve, or a config.json; no weights are read")
    add("--adapters", type=int, required=True, metavar="N", help="how many there are")
    add("--rank", type=int, required=True, help="of each")
    add("--targets", default="all-linear", help="as PEFT's target_modules, by commas")
    add("--rps", type=float, required=True, metavar="X", help="requests a second, of all replicas")
    add("--prompt-tokens", type=int, default=512, help="of a request (default: 512)")
    add("--new-tokens", type=int, default=128, help="of an answer (default: 128)")
    add("--device", default="h100", help="h100, h200, a100, l4 or cpu: this one (default: h100)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--memory", type=_bytes, help="of the device, as 24Gi")
    add("--host-memory", type=_bytes, help="of a replica (default: as much as the device's)")
    add("--disk", type=_bytes, help="of a replica")
    add("--bandwidth", type=_bytes, metavar="B/S", help="bytes a second read on the device, as 28G")
    add("--flops", type=_bytes, metavar="OP/S", help="of its products, as 1.6T")
    add("--tokens-per-second", type=float, help="that a replica was measured to generate")
    add("--headroom", type=float, default=0.7, help="share of its most to use (default: 0.7)")
    add("--replicas", type=int, metavar="N", help="that there are (default: as many as it takes)")
    add("--max-batch-size", type=int, help="as of lorax-serve")
    add("--slots", type=int, help="as --adapter-slots of lorax-serve")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        LoraxError: what cannot be read or does not fit.
    """
    for name in ("memory", "host_memory", "disk", "bandwidth", "flops", "tokens_per_second"):
        _positive(name, getattr(options, name))
    for name in ("replicas", "max_batch_size", "slots"):
        _positive(name, getattr(options, name))
    # torch takes a second, which other commands need not wait for.
    import torch

    from lorax_serve.checkpoint.spec_cache import load_spec
    from lorax_serve.cli.capacity import Demand, Memory, plan
    from lorax_serve.cli.devices import device

    targets = options.targets
    demand = Demand(
        options.adapters,
        options.rank,
        targets if targets == "all-linear" else tuple(targets.split(",")),
        options.rps,
        options.prompt_tokens,
        options.new_tokens,
        options.headroom,
    )
    with _config_directory(options.model) as directory:
        spec = load_spec(directory)
    found = plan(
        spec,
        getattr(torch, options.dtype),
        demand,
        device(options.device, options.memory, options.bandwidth, options.flops),
        Memory(options.host_memory, options.disk),
        batch_size=options.max_batch_size,
        slots=options.slots,
        tokens_per_second=options.tokens_per_second,
        replicas=options.replicas,
    )
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print("\n".join(_lines(found)))


@contextmanager
def _config_directory(model: str) -> Iterator[Path]:
    """A directory with the model's config.json.

    Raises:
        ModelUnsupported: there is none.
    """
    from lorax_serve.checkpoint.source import EMBEDDED_MODEL, resolve_model

    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        with tempfile.TemporaryDirectory() as place:  # it may have any name
            shutil.copy(path, Path(place) / "config.json")
            yield Path(place)
    elif model == EMBEDDED_MODEL or path.suffix == ".gguf" or path.is_dir():
        yield resolve_model(model)
    else:
        raise ModelUnsupported(
            f"model {model}: no such directory or config.json; of a model on the Hub, fetch its "
            "config.json alone and name that"
        )


def _lines(found: Capacity) -> Iterator[str]:
    rows = [
        (name.replace("_", " "), _shown(figure.value, figure.unit), figure.kind, figure.what)
        for name, figure in found.figures.items()
    ]
    yield from table([("FIGURE", "VALUE", "KIND", "WHAT"), *rows])
    yield ""
    flags = " ".join(f"--{name} {value}" for name, value in found.flags.items())
    yield f"flags of each lorax-serve: {flags}"
    yield "values of the Helm chart:"
    yield f"  replicas: {found.replicas}"
    yield "  settings:"
    yield from (f"    {name}: {value}" for name, value in found.flags.items())
    yield ""
    yield "a floor is not less than that, a ceiling not more; exact is as the server counts"
    for note in found.notes:
        yield f"note: {note}"


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        size = next((s for s in ("Gi", "Mi", "Ki") if value >= _UNITS[s.lower()]), "")
        return f"{value / _UNITS[size.lower()]:.4g} {size}B"
    if unit in ("bytes/s", "operations/s"):
        size = next((s for s in "TGM" if value >= _UNITS[s.lower()]), "")
        return f"{value / _UNITS[size.lower()]:.4g} {size} {unit}"
    if unit == "s":
        return f"{1e3 * value:.3g} ms"
    return f"{value:,.4g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _bytes(text: str) -> int:
    """A number with a unit of Kubernetes: 24Gi, 1.5T."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?)b?", text.lower())
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2]])
    except (AssertionError, ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 24Gi or 1.5T") from None


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise InvalidRequest(f"{name} must be more than 0, found {value:g}")
