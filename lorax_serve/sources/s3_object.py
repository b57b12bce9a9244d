"""One object of a bucket, which is downloaded again only when it has changed. Needs boto3."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from botocore import exceptions

from lorax_serve.errors import SourceFailed, SourceReason
from lorax_serve.sources.s3_client import S3Clients, cut_off_after, failures
from lorax_serve.sources.source import shown
from lorax_serve.sources.transfer import NETWORK_SECONDS

__all__ = ["S3Object"]

_CHUNK = 1 << 16
_NOT_MODIFIED = 304


class S3Object:
    """An object that is read again and again, by one thread at a time.

    Args:
        bucket: its bucket.
        key: its name there.
    """

    def __init__(self, bucket: str, key: str) -> None:
        self._bucket = bucket
        self._key = key
        self._uri = shown(f"s3://{bucket}/{key}")
        self._clients = S3Clients()
        self._tag: str | None = None
        self._content = b""

    @property
    def uri(self) -> str:
        """``s3://bucket/key``."""
        return self._uri

    def read(self, most: int, seconds: float) -> bytes:
        """Its content. A bucket that says that the object is as it was last time (by its ETag) is
        believed, and asked for nothing more.

        Args:
            most: bytes that it may have.
            seconds: for all of it; a server may be silent for no longer than 10 of them.

        Raises:
            SourceFailed: it was not given, or not whole, or it has more bytes, of which nothing
                is read then.
        """
        end = time.monotonic() + seconds
        silence = min(seconds, NETWORK_SECONDS)
        with failures(self._uri), closing(self._clients.client(silence)) as client:
            condition = {} if self._tag is None else {"IfNoneMatch": self._tag}
            try:
                answer = client.get_object(Bucket=self._bucket, Key=self._key, **condition)
            except exceptions.ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if condition and status == _NOT_MODIFIED:
                    return self._content
                raise
            content = self._download(answer, most, end)
            self._tag, self._content = answer.get("ETag"), content
        return content

    def _download(self, answer: Any, most: int, end: float) -> bytes:
        body, size = answer["Body"], answer["ContentLength"]
        with body as stream, cut_off_after(max(0.0, end - time.monotonic()), stream):
            if size > most:
                raise SourceFailed(
                    SourceReason.TOO_LARGE,
                    f"{self._uri}: has {size} bytes, more than {most}; check that it is the right "
                    "object",
                )
            content, problem = bytearray(), None
            try:
                for chunk in body.iter_chunks(_CHUNK):
                    content += chunk
                    if len(content) > size or time.monotonic() > end:
                        break
            except exceptions.BotoCoreError as error:  # cut off, by the server or by us
                problem = error
        if time.monotonic() > end:
            raise SourceFailed(
                SourceReason.TIMEOUT, f"{self._uri}: did not come in time; try again"
            ) from problem
        if problem is not None:
            raise problem
        if len(content) != size:
            raise SourceFailed(
                SourceReason.TRUNCATED,
                f"{self._uri}: {size} bytes were announced and {len(content)} came; try again",
            )
        return bytes(content)
