"""Content and catalogue brought into line: nothing that is needed goes, nothing else stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorax_serve.errors import StoreFailed
from lorax_serve.store.catalog import Catalog
from lorax_serve.store.content import ContentStore

__all__ = ["Recovery", "recover", "remove_unreferenced"]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found at opening.

    Attributes:
        removed: content that nothing referred to: committed, but never acknowledged, or no longer
            needed when the server stopped.
        freed: its bytes.
        missing: names whose content is not there.
        damaged: names whose content has other bytes than it had; only if they were read.
    """

    removed: frozenset[str]
    freed: int
    missing: tuple[str, ...]
    damaged: tuple[str, ...]


def recover(content: ContentStore, catalog: Catalog, *, verify: bool = False) -> Recovery:
    """Remove content that nothing refers to, and find the names that cannot be served.

    The records of those names stay: their content may be restored, or loaded again.

    Args:
        content: of the state directory.
        catalog: of the same one; nobody else uses either yet.
        verify: read all bytes of what the names mean, and compare them with the digests.

    Raises:
        StoreFailed: the catalogue is new, but there is content: the one it belongs to is lost.
        StoreFailed, Overloaded: the disk fails.
    """
    digests = content.digests()
    if catalog.created and digests:
        raise StoreFailed(
            f"{content.root} has {len(digests)} adapters, but the catalogue that names them is "
            "gone, so they would be deleted; restore it from a backup, or remove the state "
            "directory to begin with an empty one"
        )
    unreferenced = frozenset(digests - catalog.referenced())
    freed = remove_unreferenced(content, catalog, unreferenced)
    missing, damaged = [], []
    whole: dict[str, bool] = {}
    for record in catalog.names():
        if record.digest not in content:
            missing.append(record.name)
        elif verify:
            if record.digest not in whole:
                whole[record.digest] = content.verify(record.digest)
            if not whole[record.digest]:
                damaged.append(record.name)
    return Recovery(unreferenced, freed, tuple(missing), tuple(damaged))


def remove_unreferenced(content: ContentStore, catalog: Catalog, digests: Iterable[str]) -> int:
    """Remove what nothing refers to of ``digests``; returns the bytes that this frees.

    To be called after the unload, the replacement or the failed load that left them over, outside
    of the stage's block. From any thread: content that another load has taken up since stays.

    Raises:
        StoreFailed, Overloaded: the disk fails.
    """
    return sum(content.remove(digest, unless=catalog.is_referenced) for digest in digests)
