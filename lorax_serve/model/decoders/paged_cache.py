"""Keys and values of running sequences in pages, which a GPU's kernels find through a table.

What ``engine.kv_rows`` calls a row is here a list of pages, taken from one pool as positions are
first used. It is all decided on the host, before a step; the device gets what has changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lorax_serve.core import RowCopy
from lorax_serve.gpu.pages import PAGE, LayerPages, pages_of

__all__ = ["PagedKVCache", "bytes_per_token"]


def bytes_per_token(num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one position's keys and values in all layers."""
    return 2 * num_layers * kv_heads * head_dim * dtype.itemsize


class PagedKVCache:
    """``pages`` pages, for ``slots`` rows of ``max_length`` positions at most.

    Before a step: ``copy``, then ``reserve`` for all that it writes, then ``flush``.

    A copied prefix shares its full pages; references to each page are counted, and it is free when
    there are none. Two rules keep a shared page as it is:

    - A page is copied whole when only a part of it is shared, so that a row which goes on after its
      prefix has a last page of its own.
    - ``reserve`` gives a row a page of its own where it writes into one that others have too: a
      cached prefix of 100 tokens, 96 of them shared, may be continued from its 40th.

    The pool suffices if it has as many pages as ``KVRows`` has blocks, and copies come in the order
    of ``KVRows``. A row has never more pages here than blocks there: every loss of blocks is in the
    list, in its place, and pages come only with a copy or a reservation, which take no more than
    the row was given before. Pages in use are at most those of all rows counted one by one, and one
    less where a page is shared that must be replaced.

    Nothing is cleared. Positions are read only after they were written for the row that reads them,
    or for one that it has a prefix from, so that whatever was left in a page, NaN included, reaches
    nobody. A failed sequence's pages may be shared too. Those that it got from others hold what
    they held, because it wrote to none of them; those that others got from it hold what it
    computed from the same tokens with the same adapter as theirs: computing it again would not
    help, and each of these sequences fails by itself.

    Args:
        num_layers, kv_heads, head_dim, dtype, device: of the model.
        slots: rows.
        max_length: most positions of a row.
        pages: of the pool; ``PAGE`` positions each.

    Attributes:
        bytes_per_token: what a position takes.
        table: ``LayerPages.table``; the same tensor at all times.
    """

    def __init__(
        self,
        num_layers: int,
        slots: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pages: int,
    ) -> None:
        self.max_length = max_length
        self.bytes_per_token = bytes_per_token(num_layers, kv_heads, head_dim, dtype)
        self._max_pages = pages_of(max_length)
        shape = (num_layers, 2, pages, kv_heads, PAGE, head_dim)
        self._storage = torch.empty(shape, dtype=dtype, device=device)
        self.table = torch.full((slots, self._max_pages), -1, dtype=torch.int32, device=device)
        self._layers = [LayerPages(layer[0], layer[1], self.table) for layer in self._storage]
        self._rows: list[list[int]] = [[] for _ in range(slots)]
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._entries: dict[int, int] = {}
        """What has changed of the table: where, counted through its rows, and the page there."""
        self._copies: dict[int, int] = {}
        """Pages to be filled, and from which; all are read before one is written."""

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._storage.nbytes + self.table.nbytes

    @property
    def free_pages(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    def layer(self, index: int) -> LayerPages:
        """A layer's keys and values; the same tensors at all times."""
        return self._layers[index]

    def copy(self, copies: Iterable[RowCopy]) -> None:
        """Copy and free as ``RowCopy`` says, one after the other."""
        for source, destination, length in copies:
            if source == destination:
                self.free(source, length)
            else:
                self._share(source, destination, length)

    def free(self, slot: int, length: int) -> None:
        """Give back the pages of a row's positions from ``length`` on, but for what shares one with
        a position before."""
        row = self._rows[slot]
        keep = pages_of(length)
        for block in range(keep, len(row)):
            self._leave(row[block])
            self._note(slot, block, -1)
        del row[keep:]

    def scrub(self, slot: int, length: int) -> None:
        """Nothing: see the class."""

    def reserve(self, slot: int, begin: int, end: int) -> None:
        """Let a row have pages of its own to write positions ``[begin, end)``; what lies before
        them stays. There must be no gap: the row has all positions before ``begin``.

        Raises:
            ValueError: ``end`` is beyond ``max_length``.
            RuntimeError: no page is left, which cannot be if ``KVRows`` counts the blocks.
        """
        if end > self.max_length:
            raise ValueError(f"position {end - 1} of a row that ends at {self.max_length}")
        row = self._rows[slot]
        for block in range(begin // PAGE, pages_of(end)):
            if block == len(row):
                row.append(self._take(slot, block))
                continue
            page = row[block]
            if self._references[page] > 1:
                row[block] = self._take(slot, block)
                if block * PAGE < begin:
                    self._fill(row[block], page)
                self._leave(page)

    def flush(self) -> None:
        """Bring the device up to date: a small copy if anything has changed, else nothing.

        It does not wait for the device; on the stream of the step, it is done before the step.
        """
        if not (self._entries or self._copies):
            return
        # Pinned memory, so that the copy needs nobody to wait. torch gives it to no other before
        # the copy was done.
        changes = torch.tensor(
            [[*self._entries, *self._copies], [*self._entries.values(), *self._copies.values()]],
            dtype=torch.int64,
            pin_memory=self.table.device.type == "cuda",
        ).to(self.table.device, non_blocking=True)
        where, what = changes[:, : len(self._entries)]
        self.table.view(-1).index_copy_(0, where, what.int())
        if self._copies:
            to, of = changes[:, len(self._entries) :]
            # Layer by layer: what is between reading and writing takes little memory.
            for layer in self._storage:
                layer.index_copy_(1, to, layer.index_select(1, of))
        self._entries.clear()
        self._copies.clear()

    def _share(self, source: int, destination: int, length: int) -> None:
        """Let a row begin with the first ``length`` positions of another, and have no more."""
        self.free(destination, 0)
        pages, row = self._rows[source], self._rows[destination]
        full = length // PAGE
        for block, page in enumerate(pages[:full]):
            self._references[page] += 1
            row.append(page)
            self._note(destination, block, page)
        if length % PAGE:
            row.append(self._take(destination, full))
            self._fill(row[full], pages[full])

    def _take(self, slot: int, block: int) -> int:
        """A free page, for a block of a row."""
        if not self._free:
            raise RuntimeError("the KV cache has no free page: more is used than was counted")
        page = self._free.pop()
        self._references[page] = 1
        self._note(slot, block, page)
        return page

    def _leave(self, page: int) -> None:
        """A row has a page no more."""
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)
            self._copies.pop(page, None)

    def _fill(self, page: int, source: int) -> None:
        """Copy a page at the next ``flush``; from the first one, if ``source`` itself waits."""
        self._copies[page] = self._copies.get(source, source)

    def _note(self, slot: int, block: int, page: int) -> None:
        self._entries[slot * self._max_pages + block] = page
