"""Where names are, for those who route requests to them: versions and compositions put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lorax_serve.core import AdapterTier, AdapterWork
from lorax_serve.registry.compositions import Composed
from lorax_serve.registry.version import Adapter

__all__ = ["Residency", "residency_of"]


class Residency(NamedTuple):
    """Adapters by name; versions of a name are one.

    Attributes:
        device: names in slots, the last used first.
        host: the other names in host memory, the last used first.
        running: names with a request in the batch, by themselves or with others; sorted.
        waiting: the other names with requests; sorted.
    """

    device: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


def residency_of(
    versions: Iterable[Adapter],
    compositions: Iterable[Composed],
    tiers: Mapping[int, AdapterTier],
    work: AdapterWork,
) -> Residency:
    """Where names are.

    Args:
        versions: all of them.
        compositions: of them.
        tiers: where each is, by key.
        work: which of them have requests, by key.
    """
    names: dict[int, tuple[str, ...]] = {}
    by_use: dict[AdapterTier, dict[str, None]] = {tier: {} for tier in AdapterTier}
    for adapter in sorted(versions, key=lambda adapter: -adapter.last_used):
        names[adapter.key] = (adapter.name,)
        if adapter.key in tiers:
            by_use[tiers[adapter.key]][adapter.name] = None
    for composed in compositions:
        names[composed.key] = tuple(part.name for part, _ in composed.parts)

    def named(keys: Iterable[int]) -> set[str]:
        return {name for key in keys for name in names.get(key, ())}

    device = by_use[AdapterTier.DEVICE]
    running = named(work.running)
    return Residency(
        device=tuple(device),
        host=tuple(name for name in by_use[AdapterTier.HOST] if name not in device),
        running=tuple(sorted(running)),
        waiting=tuple(sorted(named(work.waiting) - running)),
    )
