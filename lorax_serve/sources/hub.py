"""Adapters in repos of the Hugging Face Hub, or of a mirror of it (``HF_ENDPOINT``).

Files are streamed to where they are wanted, not by way of the Hub's cache: huggingface_hub's own
download has no deadline and no limit of size. What the cache has is taken from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import (
    errors,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

from lorax_serve.errors import InvalidRequest, SourceFailed, SourceReason
from lorax_serve.sources.files import chunks_of, open_below
from lorax_serve.sources.source import (
    ADAPTER_FILES,
    CONFIG_FILE,
    FetchLimits,
    reason_of_status,
    segments_of,
)
from lorax_serve.sources.transfer import NETWORK_SECONDS, Transfer, place

__all__ = ["HubSource"]

_IDENTITY = {"Accept-Encoding": "identity"}
_ADVICE = {
    SourceReason.NOT_FOUND: "check the repo, the revision and the path",
    SourceReason.DENIED: "check the repo's name and that HF_TOKEN may read it",
    SourceReason.UNAVAILABLE: "try again; if it stays, check HF_ENDPOINT and the network",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an adapter is: a folder of a repo at a revision."""

    repo: str
    revision: str
    folder: tuple[str, ...]

    def file(self, name: str) -> str:
        return "/".join((*self.folder, name))


class HubSource:
    """An organisation's repos, or the folders of one repo. An adapter's signature is its commit.

    Args:
        owner: the organisation or user.
        repo: of theirs; "" is all of them, and a path's first name says which.
        revision: a branch, tag or commit; "" is ``main``.
        folder: of the repo, "" is its root.
    """

    def __init__(self, owner: str, repo: str, revision: str, folder: str) -> None:
        self._owner = owner
        self._repo = repo
        self._revision = revision or "main"
        self._folder = tuple(folder.split("/")) if folder else ()
        at = f"@{revision.replace('/', '%2F')}" if revision else ""
        self._uri = "/".join((f"hf://{owner}", *([repo + at] if repo else ()), *self._folder))

    @property
    def uri(self) -> str:
        """``hf://org/repo@revision/folder``."""
        return self._uri

    def signature(self, path: str) -> str:
        """See ``Source``."""
        return self._commit(self._locate(path), path, NETWORK_SECONDS)

    def fetch(self, path: str, into: Path, limits: FetchLimits) -> str:
        """See ``Source``."""
        transfer = Transfer(place(self._uri, path), into, limits)
        named = self._locate(path)
        commit = self._commit(named, path, transfer.network_seconds())
        # A commit never changes, so the files of one belong together.
        found = _Place(named.repo, commit, named.folder)
        for name in ADAPTER_FILES:
            where = place(self._uri, path, name)
            cached = _cached(found, name)
            if cached is not None:
                _copy(cached, name, where, transfer)
            else:
                _download(found, name, where, transfer)
        return commit

    def _locate(self, path: str) -> _Place:
        segments = segments_of(path, self._uri)
        repo = self._repo
        if not repo:
            if not segments:
                raise InvalidRequest(f"path is empty: it must begin with a repo of {self._uri}")
            repo, *rest = segments
            segments = tuple(rest)
        return _Place(f"{self._owner}/{repo}", self._revision, self._folder + segments)

    def _commit(self, at: _Place, path: str, seconds: float) -> str:
        """The commit that the revision means now; what the cache last knew if the Hub is away."""
        where = place(self._uri, path, CONFIG_FILE)
        try:
            commit, _ = _metadata(at, CONFIG_FILE, where, seconds)
        except SourceFailed as error:
            cached = _cached(at, CONFIG_FILE) if error.retryable or _offline() else None
            if cached is None:
                raise
            return cached.parents[len(at.folder)].name
        return commit


def _offline() -> bool:
    return huggingface_hub.constants.HF_HUB_OFFLINE


def _cached(at: _Place, name: str) -> Path | None:
    try:
        found = try_to_load_from_cache(at.repo, at.file(name), revision=at.revision)
    except (OSError, ValueError):  # a damaged cache is none
        return None
    return Path(found) if isinstance(found, str) else None


def _metadata(at: _Place, name: str, where: str, seconds: float) -> tuple[str, int]:
    """A file's commit and bytes."""
    with _failures(where):
        url = hf_hub_url(at.repo, at.file(name), revision=at.revision)
        found = get_hf_file_metadata(url, timeout=seconds)
    if found.commit_hash is None or found.size is None:
        raise SourceFailed(
            SourceReason.UNAVAILABLE,
            f"{where}: the server does not answer as a Hub does; check HF_ENDPOINT",
        )
    return found.commit_hash, found.size


def _download(at: _Place, name: str, where: str, transfer: Transfer) -> None:
    _, size = _metadata(at, name, where, transfer.network_seconds())
    with _failures(where):
        request = get_session().stream(
            "GET",
            hf_hub_url(at.repo, at.file(name), revision=at.revision),
            headers=build_hf_headers() | _IDENTITY,
            timeout=transfer.network_seconds(),
            follow_redirects=True,
        )
        with request as answer:
            if answer.status_code != 200:
                raise _refused(where, answer.status_code)
            # Pieces as they come, so that the deadline is looked at however slow they are.
            with _failures(where, broken=SourceReason.TRUNCATED):
                transfer.write(name, size, answer.iter_bytes())


def _copy(cached: Path, name: str, where: str, transfer: Transfer) -> None:
    descriptor = open_below(os.path.sep, str(cached), where)
    try:
        size = os.fstat(descriptor).st_size
        transfer.write(name, size, chunks_of(descriptor, size, where))
    finally:
        os.close(descriptor)


@contextmanager
def _failures(where: str, broken: SourceReason = SourceReason.UNAVAILABLE) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into ``SourceFailed``.

    Their messages stay out of it: they may hold signed URLs.

    Args:
        where: what the message calls the file.
        broken: what a connection that breaks off means.
    """
    try:
        yield
    except SourceFailed:
        raise
    except errors.HfHubHTTPError as error:
        raise _refused(where, error.response.status_code) from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceFailed(
            SourceReason.NOT_FOUND,
            f"{where}: is not in the Hub's cache, and HF_HUB_OFFLINE is set; fetch it with "
            "'hf download', or unset HF_HUB_OFFLINE",
        ) from error
    except errors.HFValidationError as error:
        raise SourceFailed(
            SourceReason.NOT_FOUND, f"{where}: no repo can have this name; check it"
        ) from error
    except Exception as error:  # the HTTP library is httpx or another, by huggingface_hub's version
        reason, what = _meaning(error, broken)
        advice = _ADVICE.get(reason, "try again")
        raise SourceFailed(reason, f"{where}: {what}; {advice}") from error


def _meaning(error: Exception, broken: SourceReason) -> tuple[SourceReason, str]:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    kind = type(error).__name__
    if "TimeoutException" in kinds:
        return SourceReason.TIMEOUT, "the server did not answer in time"
    if kinds & {"ReadError", "RemoteProtocolError", "DecodingError"}:
        return broken, f"the server broke off its answer ({kind})"
    return SourceReason.UNAVAILABLE, f"the server could not be asked ({kind})"


def _refused(where: str, status: int) -> SourceFailed:
    reason = reason_of_status(status)
    advice = _ADVICE.get(reason, "try again")
    return SourceFailed(reason, f"{where}: the Hub answered {status}; {advice}")
