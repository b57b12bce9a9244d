"""What a request and its answer tell proxies in metadata, which they read without the messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["ADAPTER_METADATA", "REPLICA_METADATA", "routing_key"]

ADAPTER_METADATA = "lorax-adapter"
"""Request metadata: the routing key, by which proxies send an adapter's requests to one replica."""

REPLICA_METADATA = "lorax-replica"
"""Trailing metadata of every call of ours: which replica has answered. It is trailing because a
proxy, and gRPC itself, makes a call again only while no header has come."""


def routing_key(adapter_ids: Iterable[str]) -> str:
    """What requests that should meet on one replica have in common.

    It is the adapter's name without ``@digest``: versions of a name share most of what is cached
    under it, and a roll back moves nobody. A composition's is its parts' names, sorted and joined
    with ``+``, which no name has; scales do not count. The base model's is empty, and is not sent.
    """
    return "+".join(sorted(adapter_id.partition("@")[0] for adapter_id in adapter_ids))
