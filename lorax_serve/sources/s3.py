"""Adapters in a bucket of S3, or of anything that speaks its protocol. Needs boto3."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from botocore import exceptions

from lorax_serve.sources.s3_client import S3Clients, cut_off_after, failures
from lorax_serve.sources.source import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    FetchLimits,
    segments_of,
)
from lorax_serve.sources.transfer import NETWORK_SECONDS, Transfer, place

__all__ = ["S3Source"]

_CHUNK = 1 << 18


class S3Source:
    """The keys below a prefix of a bucket.

    Args:
        bucket: its name.
        prefix: of all keys, without a slash at either end; "" is the whole bucket.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._clients = S3Clients()

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return self._uri

    def list(self) -> dict[str, str]:
        """See ``WatchableSource``. Asks once for each thousand keys."""
        tags: dict[str, dict[str, str]] = {}
        with failures(self._uri), closing(self._clients.client(NETWORK_SECONDS)) as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    name, _, file = entry["Key"].removeprefix(self._prefix).partition("/")
                    if file in ADAPTER_FILES and name and not name.startswith("."):
                        tags.setdefault(name, {})[file] = _tag(entry["ETag"], entry["Size"])
        return {
            name: f"{files[CONFIG_FILE]}-{files.get(WEIGHTS_FILE, 'absent')}"
            for name, files in tags.items()
            if CONFIG_FILE in files
        }

    def signature(self, path: str) -> str:
        """See ``Source``."""
        key = self._key(path)
        with (
            failures(place(self._uri, path)),
            closing(self._clients.client(NETWORK_SECONDS)) as client,
        ):
            heads = [self._head(client, key, path, name) for name in ADAPTER_FILES]
        return _signature(heads)

    def fetch(self, path: str, into: Path, limits: FetchLimits) -> str:
        """See ``Source``."""
        transfer = Transfer(place(self._uri, path), into, limits)
        key = self._key(path)
        with (
            failures(place(self._uri, path)),
            closing(self._clients.client(transfer.network_seconds())) as client,
        ):
            # Both are looked at before either is read, and read only as they were then: so there
            # was a moment at which these two belonged together.
            heads = []
            for name in ADAPTER_FILES:
                heads.append(self._head(client, key, path, name))
                transfer.seconds_left()
            for name, head in zip(ADAPTER_FILES, heads, strict=True):
                self._download(client, key, path, name, head, transfer)
        return _signature(heads)

    def _download(
        self, client: Any, key: str, path: str, name: str, head: Any, transfer: Transfer
    ) -> None:
        with failures(place(self._uri, path, name)):
            answer = client.get_object(Bucket=self._bucket, Key=key + name, IfMatch=head["ETag"])
            body = answer["Body"]
            with body as stream, cut_off_after(transfer.seconds_left(), stream):
                try:
                    transfer.write(name, head["ContentLength"], body.iter_chunks(_CHUNK))
                except exceptions.BotoCoreError:
                    transfer.seconds_left()
                    raise

    def _head(self, client: Any, key: str, path: str, name: str) -> Any:
        with failures(place(self._uri, path, name)):
            return client.head_object(Bucket=self._bucket, Key=key + name)

    def _key(self, path: str) -> str:
        return self._prefix + "".join(f"{name}/" for name in segments_of(path, self._uri))


def _tag(etag: str, size: int) -> str:
    quoted = etag.strip('"')
    return f"{quoted}.{size}"


def _signature(heads: list[Any]) -> str:
    return "-".join(_tag(head["ETag"], head["ContentLength"]) for head in heads)
