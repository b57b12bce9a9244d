"""What speaks to S3, or to anything that speaks its protocol. Needs boto3."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import boto3
import botocore.session
from botocore import exceptions
from botocore.config import Config

from lorax_serve.errors import SourceFailed, SourceReason
from lorax_serve.sources.source import reason_of_status

__all__ = ["S3Clients", "cut_off_after", "failures"]

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


class S3Clients:
    """Makes clients of one session, whose credentials, region and endpoint boto3 finds.

    A session reads the files of credentials once, so that there is a new one after they have
    changed: Kubernetes puts other ones in their place when somebody rotates a Secret.
    """

    def __init__(self) -> None:
        # Clients may be used by many threads, but made by one at a time.
        self._making = threading.Lock()
        self._session: Any = None
        self._files: list[str] = []
        self._versions: list[_Version | None] = []

    def client(self, seconds: float) -> Any:
        """A client that waits for a server no longer than ``seconds`` and leaves retries to the
        caller, who closes it; making one takes milliseconds.
        """
        config = Config(
            connect_timeout=seconds, read_timeout=seconds, retries={"total_max_attempts": 1}
        )
        with self._making:
            client = self._current_session().client("s3", config=config)
        client.meta.events.register("before-call.s3.HeadBucket", _OnlyOnce())
        return client

    def _current_session(self) -> Any:
        if self._session is None or self._versions != [_version(file) for file in self._files]:
            found = botocore.session.get_session()
            names = ("credentials_file", "config_file")
            self._files = [os.path.expanduser(found.get_config_variable(name)) for name in names]
            # Before it reads them: what changes meanwhile is seen the next time.
            self._versions = [_version(file) for file in self._files]
            self._session = boto3.session.Session(botocore_session=found)
        return self._session


class _Version(NamedTuple):
    device: int
    inode: int
    size: int
    changed_ns: int


def _version(file: str) -> _Version | None:
    """Tells the file that a path leads to now, over links, from others; None: there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return _Version(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


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


@contextmanager
def cut_off_after(seconds: float, stream: Any) -> Iterator[None]:
    """End the body of an answer, whatever it is waiting for, if the block lasts longer. A server
    that trickles keeps each read alive."""
    watchdog = threading.Timer(seconds, _cut_off, (stream,))
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _cut_off(stream: Any) -> None:
    # Raises if the last byte has come just now.
    with suppress(RuntimeError, ValueError, OSError):
        stream.shutdown()


@contextmanager
def failures(where: str) -> Iterator[None]:
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
