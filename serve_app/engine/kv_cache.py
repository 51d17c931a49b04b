"""Pages of KV cache: which sequences hold them, which may be shared, and the tensors behind them.

`PagePool` is plain bookkeeping, tested without a device. Full pages are named by a chained hash of the tokens up to
their end, so an equal prefix is computed once. A page without a holder keeps its contents until it is needed.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from serve_app.engine.host_memory import ask_for_huge_pages

_FREE_EXTENT = re.compile(rb"\x00+")


def page_hash(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """The name of a full page: a hash of its tokens and of the previous page's name (`root_hash` for the first)."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16, key=parent).digest()


def root_hash(salt: str) -> bytes:
    """The parent of a first page. Different salts never share a page."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


class _FreePages:
    """Free pages as a stack: the one released last is taken first. For kernels that read pages in any order."""

    def __init__(self, num_pages: int) -> None:
        self._pages = list(reversed(range(num_pages)))

    def __len__(self) -> int:
        return len(self._pages)

    def take(self, last: int | None, count: int) -> int:
        """Take the first of `count` pages that will follow the holder's page `last`."""
        return self._pages.pop()

    def give(self, page: int) -> None:
        self._pages.append(page)


class _FreeRuns:
    """Free pages by address, so that those of one holder are neighbours. For kernels that read runs in place.

    If the neighbouring page is taken, `take` searches for another: with 10,000 pages, nearly all taken, that costs
    0.2 ms instead of 1 us.
    """

    def __init__(self, num_pages: int) -> None:
        self._taken = bytearray(num_pages)
        self._free = num_pages

    def __len__(self) -> int:
        return self._free

    def take(self, last: int | None, count: int) -> int:
        """Take the page after `last` if it is free, else one with free pages after it."""
        continues = last is not None and last + 1 < len(self._taken) and not self._taken[last + 1]
        page = last + 1 if last is not None and continues else self._roomy_start(count)
        self._taken[page] = 1
        self._free -= 1
        return page

    def give(self, page: int) -> None:
        self._taken[page] = 0
        self._free += 1

    def _roomy_start(self, count: int) -> int:
        # Starting in the middle of the largest free extent lets both this run and the one before it grow in place.
        extent = max(_FREE_EXTENT.finditer(self._taken), key=lambda m: m.end() - m.start())
        start, size = extent.start(), extent.end() - extent.start()
        return start if start == 0 else start + max(0, min(size // 2, size - count))


class PagePool:
    """Hands out pages 0 to `num_pages - 1`, counts who holds each, and remembers the contents of full ones.

    A page is free (contents meaningless), used (held at least once) or cached (not held, contents still valid; the
    least recently used one is reused first).
    """

    def __init__(self, num_pages: int, *, in_runs: bool = True) -> None:
        """`in_runs`: whether a holder's pages should be neighbours, for a kernel that reads contiguous runs in place
        (`AttentionBackend.reads_runs`). Without it taking a page costs the same for any number of pages."""
        self.num_pages = num_pages
        self._free: _FreeRuns | _FreePages = _FreeRuns(num_pages) if in_runs else _FreePages(num_pages)
        self._holders = [0] * num_pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> int:
        return self.num_pages - self.available

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages, each held once, or None when fewer are available. `after`: the holder's last page."""
        if count > self.available:
            return None
        pages: list[int] = []
        while len(pages) < count:
            page = self._free.take(pages[-1] if pages else after, count - len(pages)) if self._free else self._evict()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        return page

    def idle(self, pages: SequenceOf[int]) -> int:
        """How many of these pages have no holder. Holding them all lowers `available` by this number."""
        return sum(1 for page in pages if not self._holders[page])

    def hold(self, pages: SequenceOf[int]) -> None:
        """Add a holder to each of these (used or cached) pages."""
        for page in pages:
            if self._holders[page] == 0:
                if page not in self._evictable:
                    raise ValueError(f"page {page} is free and can't be held")
                del self._evictable[page]
            self._holders[page] += 1

    def release(self, pages: SequenceOf[int]) -> None:
        """Remove a holder from each of these pages. Later pages of a prefix are evicted before earlier ones."""
        for page in reversed(pages):
            if self._holders[page] == 0:
                raise ValueError(f"page {page} has no holder and can't be released")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._hash_of:
                    self._evictable[page] = None
                else:
                    self._free.give(page)

    def publish(self, page: int, name: bytes) -> None:
        """Share this full page under its hash `name`, unless another page has that name already."""
        if page not in self._hash_of and name not in self._page_of:
            self._hash_of[page] = name
            self._page_of[name] = page

    def lookup(self, names: SequenceOf[bytes]) -> list[int]:
        """The pages of the longest known prefix of a hash chain. The call does not hold them."""
        pages: list[int] = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class KVCache:
    """The tensors: for each layer keys and values `[pages, page_tokens, kv_heads, head_dim]`, zeros at first."""

    def __init__(self, layers: dict[int, LayerShape], num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, layer in layers.items():
            shape = (num_pages, page_tokens, layer.kv_heads)
            self._layers[index] = (_zeros((*shape, layer.key_dim), layer), _zeros((*shape, layer.value_dim), layer))
        self.bytes = num_pages * page_tokens * sum(layer.bytes_per_token for layer in layers.values())

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[index]


def _zeros(shape: tuple[int, ...], layer: LayerShape) -> torch.Tensor:
    """Zeros in large pages, which must be asked for before the first write (`torch.zeros` writes at once)."""
    tensor = torch.empty(shape, dtype=layer.dtype, device=layer.device)
    if layer.device.type == "cpu":
        ask_for_huge_pages(tensor)
    return tensor.zero_()
