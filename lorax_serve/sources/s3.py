"""Adapters in a bucket of S3, or of anything that speaks its protocol. Needs boto3."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
from botocore import exceptions
from botocore.config import Config

from lorax_serve.errors import SourceFailed, SourceReason
from lorax_serve.sources.source import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    FetchLimits,
    reason_of_status,
    segments_of,
)
from lorax_serve.sources.transfer import NETWORK_SECONDS, Transfer, place

__all__ = ["S3Source"]

_CHUNK = 1 << 18

_CREDENTIALS = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.CredentialRetrievalError,
    exceptions.NoAuthTokenError,
    exceptions.TokenRetrievalError,
    exceptions.SSOError,
    exceptions.ProfileNotFound,
)
_TIMEOUTS = (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError)
_BROKEN = (
    exceptions.IncompleteReadError,
    exceptions.ResponseStreamingError,
    exceptions.FlexibleChecksumError,
)
_ADVICE = {
    SourceReason.NOT_FOUND: "check the bucket and the path",
    SourceReason.DENIED: "check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE), the region and "
    "that they may read and list this bucket",
    SourceReason.UNAVAILABLE: "try again; if it stays, check AWS_ENDPOINT_URL_S3, the region "
    "and the network",
}


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
        # Clients may be used by many threads, but made by one at a time.
        self._making = threading.Lock()
        self._session: Any = None

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return self._uri

    def list(self) -> dict[str, str]:
        """See ``WatchableSource``. Asks once for each thousand keys."""
        tags: dict[str, dict[str, str]] = {}
        with _failures(self._uri), closing(self._client(NETWORK_SECONDS)) as client:
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
        with _failures(place(self._uri, path)), closing(self._client(NETWORK_SECONDS)) as client:
            heads = [self._head(client, key, path, name) for name in ADAPTER_FILES]
        return _signature(heads)

    def fetch(self, path: str, into: Path, limits: FetchLimits) -> str:
        """See ``Source``."""
        transfer = Transfer(place(self._uri, path), into, limits)
        key = self._key(path)
        with (
            _failures(place(self._uri, path)),
            closing(self._client(transfer.network_seconds())) as client,
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
        with _failures(place(self._uri, path, name)):
            answer = client.get_object(Bucket=self._bucket, Key=key + name, IfMatch=head["ETag"])
            body = answer["Body"]
            with body as stream:
                # A server that trickles keeps each read alive; at the deadline it is cut off.
                watchdog = threading.Timer(transfer.seconds_left(), _cut_off, (stream,))
                watchdog.daemon = True
                watchdog.start()
                try:
                    transfer.write(name, head["ContentLength"], body.iter_chunks(_CHUNK))
                except exceptions.BotoCoreError:
                    transfer.seconds_left()
                    raise
                finally:
                    watchdog.cancel()

    def _head(self, client: Any, key: str, path: str, name: str) -> Any:
        with _failures(place(self._uri, path, name)):
            return client.head_object(Bucket=self._bucket, Key=key + name)

    def _key(self, path: str) -> str:
        return self._prefix + "".join(f"{name}/" for name in segments_of(path, self._uri))

    def _client(self, seconds: float) -> Any:
        """A client that waits for a server no longer than ``seconds`` and leaves retries to the
        caller; making one takes milliseconds.
        """
        config = Config(
            connect_timeout=seconds, read_timeout=seconds, retries={"total_max_attempts": 1}
        )
        with self._making:
            if self._session is None:
                self._session = boto3.session.Session()
            client = self._session.client("s3", config=config)
        client.meta.events.register("before-call.s3.HeadBucket", _OnlyOnce())
        return client


class _OnlyOnce:
    """Lets one request pass. When it is redirected, boto3 asks a bucket for its region; where that
    is redirected too, it would ask again and again."""

    def __init__(self) -> None:
        self._passed = False

    def __call__(self, **_: Any) -> None:
        if self._passed:
            nothing: dict[str, Any] = {"Error": {}, "ResponseMetadata": {"HTTPHeaders": {}}}
            raise exceptions.ClientError(nothing, "HeadBucket")
        self._passed = True


def _cut_off(stream: Any) -> None:
    # Raises if the last byte has come just now.
    with suppress(RuntimeError, ValueError, OSError):
        stream.shutdown()


def _tag(etag: str, size: int) -> str:
    quoted = etag.strip('"')
    return f"{quoted}.{size}"


def _signature(heads: list[Any]) -> str:
    return "-".join(_tag(head["ETag"], head["ContentLength"]) for head in heads)


@contextmanager
def _failures(where: str) -> Iterator[None]:
    """Turn what boto3 and the libraries below it raise into ``SourceFailed``.

    Their messages stay out of it: they may hold signed URLs.
    """
    try:
        yield
    except SourceFailed:
        raise
    except Exception as error:  # boto3 promises no common base
        reason, what = _meaning(error)
        advice = _ADVICE.get(reason, "try again")
        raise SourceFailed(reason, f"{where}: {what}; {advice}") from error


def _meaning(error: Exception) -> tuple[SourceReason, str]:
    kind = type(error).__name__
    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        code = error.response.get("Error", {}).get("Code", "")
        if 300 <= status < 400:
            what = f"the server answered {status}, that it is to be found elsewhere"
            return SourceReason.UNAVAILABLE, what
        return reason_of_status(status), f"the server answered {status} ({str(code)[:80]})"
    if isinstance(error, _CREDENTIALS):
        return SourceReason.DENIED, f"there are no usable credentials ({kind})"
    if isinstance(error, _TIMEOUTS):
        return SourceReason.TIMEOUT, "the server did not answer in time"
    if isinstance(error, _BROKEN):
        return SourceReason.TRUNCATED, f"the content came cut off or damaged ({kind})"
    if isinstance(error, KeyError):
        return SourceReason.UNAVAILABLE, f"the server's answer has no {error}"
    return SourceReason.UNAVAILABLE, f"the server could not be asked ({kind})"
