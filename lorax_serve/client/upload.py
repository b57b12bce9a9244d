"""An adapter's directory as the messages of an upload."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lorax_serve.errors import InvalidRequest
from lorax_serve.pb.lorax.v1 import adapter_pb2 as pb
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, digest_of

__all__ = ["upload_messages"]

_CHUNK = 1 << 20


def upload_messages(
    name: str, directory: str | os.PathLike[str], weight: int | None, pinned: bool | None
) -> Iterator[pb.UploadAdapterRequest]:
    """A header with sizes and digest, then the bytes of both files.

    Raises:
        InvalidRequest: a file is missing or cannot be read.
    """
    root = Path(directory)
    try:
        header = pb.UploadHeader(
            adapter_id=name,
            digest=digest_of(root),
            config_bytes=(root / CONFIG_FILE).stat().st_size,
            weights_bytes=(root / WEIGHTS_FILE).stat().st_size,
            weight=weight,
            pinned=pinned,
        )
    except OSError as error:
        raise InvalidRequest(
            f"{root} is no adapter that can be sent: {error.strerror}: {error.filename}"
        ) from error
    return _messages(root, header)


def _messages(root: Path, header: pb.UploadHeader) -> Iterator[pb.UploadAdapterRequest]:
    yield pb.UploadAdapterRequest(header=header)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        with (root / file).open("rb") as opened:
            while data := opened.read(_CHUNK):
                yield pb.UploadAdapterRequest(data=data)
