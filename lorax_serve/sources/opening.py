"""From a URI to the source that it names. Opening touches neither disk nor network."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from lorax_serve.errors import InvalidRequest
from lorax_serve.sources.directory import DirectorySource
from lorax_serve.sources.source import Source, segments_of, shown

__all__ = ["open_source"]

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
    # What stands before an @ is never shown, whatever the scheme.
    if "@" in rest.split("/")[0]:
        raise InvalidRequest(
            f"source {shown(scheme)}://...: credentials do not belong into a URI, where logs show "
            "them; give them in the environment"
        )
    if "?" in rest or "#" in rest:
        raise InvalidRequest(
            f"source {shown(scheme)}://...: '?' and '#' mean nothing in a source's URI; in the "
            "path of a file:// URI write %3F and %23"
        )
    kinds = {"file": _file_uri, "s3": _bucket, "hf": _hub}
    if scheme.lower() not in kinds:
        raise InvalidRequest(f"source {shown(scheme)}://...: unknown scheme; give {_FORMS}")
    return kinds[scheme.lower()](rest.rstrip("/"))


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
    bucket, _, prefix = rest.partition("/")
    uri = f"s3://{shown(rest)}"
    if not _BUCKET.fullmatch(bucket):
        raise InvalidRequest(f"source {uri}: {bucket[:200]!r} is no bucket; give s3://bucket")
    segments_of(prefix, uri)
    try:
        from lorax_serve.sources.s3 import S3Source
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"source {uri}: needs {error.name}; run pip install 'lorax-serve[s3]'"
        ) from error
    return S3Source(bucket, prefix)


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
