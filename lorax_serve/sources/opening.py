"""From a URI to the source, or the object in a bucket, that it names. Opening touches neither disk
nor network."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

from lorax_serve.errors import InvalidRequest
from lorax_serve.sources.directory import DirectorySource
from lorax_serve.sources.source import Source, segments_of, shown

if TYPE_CHECKING:
    from lorax_serve.sources.s3_object import S3Object

__all__ = ["open_object", "open_source"]

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_FORMS = (
    "a directory, file:///directory, s3://bucket[/prefix], hf://org or "
    "hf://org/repo[@revision][/folder]"
)


def open_source(uri: str) -> Source:
    """The source that ``uri`` names; whether it exists shows at the first call.

    - a directory, or ``file:///absolute/directory``
    - ``s3://bucket[/prefix]``: credentials, region and endpoint come from the environment that
      boto3 reads (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL_S3``, ``AWS_PROFILE``...).
    - ``hf://org`` (each repo is an adapter) or ``hf://org/repo[@revision][/folder]``; a revision's
      own slashes are written ``%2F``. Token, endpoint and cache come from the environment that
      huggingface_hub reads (``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``).

    Raises:
        InvalidRequest: the URI is malformed or holds credentials, or boto3 is not installed.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _directory(uri)
    _check_plain("source", scheme, rest)
    kinds = {"file": _file_uri, "s3": _bucket, "hf": _hub}
    if scheme.lower() not in kinds:
        raise InvalidRequest(f"source {shown(scheme)}://...: unknown scheme; give {_FORMS}")
    return kinds[scheme.lower()](rest.rstrip("/"))


def open_object(uri: str, what: str) -> S3Object:
    """The object that ``s3://bucket/key`` names; whether it exists shows when it is read.
    Credentials, region and endpoint come from where those of a source do.

    Args:
        uri: of any scheme.
        what: the flag that says it, as messages call it.

    Raises:
        InvalidRequest: the URI is malformed, holds credentials, or names something else than an
            object in a bucket; or boto3 is not installed.
    """
    scheme, _, rest = uri.partition("://")
    if scheme.lower() != "s3":
        raise InvalidRequest(
            f"{what} {shown(scheme)}://...: is read from a file or a bucket only; give "
            f"--{what} PATH or --{what} s3://bucket/path"
        )
    _check_plain(what, scheme, rest)
    bucket, key = _bucket_and_path(what, rest)
    if not key or key.endswith("/"):
        raise InvalidRequest(
            f"{what} s3://{shown(rest)}: names no file in the bucket; give s3://bucket/path"
        )
    try:
        segments_of(key, f"s3://{bucket}")
    except InvalidRequest as error:
        raise InvalidRequest(f"{what} s3://{shown(rest)}: {error}") from error
    try:
        from lorax_serve.sources.s3_object import S3Object
    except ModuleNotFoundError as error:
        raise _missing(what, rest, error) from error
    return S3Object(bucket, key)


def _check_plain(what: str, scheme: str, rest: str) -> None:
    """Refuse what must not be in a URI, or would mean nothing there."""
    # What stands before an @ is never shown, whatever the scheme.
    if "@" in rest.split("/")[0]:
        raise InvalidRequest(
            f"{what} {shown(scheme)}://...: credentials do not belong into a URI, where logs show "
            "them; give them in the environment"
        )
    if "?" in rest or "#" in rest:
        raise InvalidRequest(
            f"{what} {shown(scheme)}://...: '?' and '#' mean nothing in this URI; in the "
            "path of a file:// URI write %3F and %23"
        )


def _directory(path: str) -> Source:
    if not path or "\0" in path:
        raise InvalidRequest(f"source {path[:200]!r} names nothing; give {_FORMS}")
    return DirectorySource(Path(path).expanduser())


def _file_uri(rest: str) -> Source:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise InvalidRequest(
            f"source file://{shown(rest)}: names the host {host[:200]!r}; an absolute directory "
            "has three slashes, file:///directory"
        )
    return _directory(os.fsdecode(b"/" + unquote_to_bytes(path)))


def _bucket(rest: str) -> Source:
    bucket, prefix = _bucket_and_path("source", rest)
    segments_of(prefix, f"s3://{shown(rest)}")
    try:
        from lorax_serve.sources.s3 import S3Source
    except ModuleNotFoundError as error:
        raise _missing("source", rest, error) from error
    return S3Source(bucket, prefix)


def _bucket_and_path(what: str, rest: str) -> tuple[str, str]:
    bucket, _, path = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidRequest(
            f"{what} s3://{shown(rest)}: {bucket[:200]!r} is no bucket; give s3://bucket"
        )
    return bucket, path


def _missing(what: str, rest: str, error: ModuleNotFoundError) -> InvalidRequest:
    return InvalidRequest(
        f"{what} s3://{shown(rest)}: needs {error.name}; run pip install 'lorax-serve[s3]'"
    )


def _hub(rest: str) -> Source:
    from lorax_serve.sources.hub import HubSource

    uri = f"hf://{shown(rest)}"
    owner, *below = segments_of(rest, uri) or ("",)
    repo, at, revision = below[0].partition("@") if below else ("", "", "")
    names = [owner, repo] if below else [owner]
    if not all(_HUB_NAME.fullmatch(name) for name in names) or (at and not revision):
        raise InvalidRequest(
            f"source {uri}: is malformed; give hf://org or hf://org/repo[@revision][/folder]"
        )
    return HubSource(owner, repo, unquote(revision), "/".join(below[1:]))
