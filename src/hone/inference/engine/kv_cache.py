"""Which KV block belongs to whom, and which blocks hold prefixes that other requests can reuse."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

PrefixKey = tuple[int, tuple[int, ...]]


class Prefix(NamedTuple):
    """Cached blocks that a token sequence starts with; `node` names the content of all of them together."""

    blocks: list[int]
    node: int


class KvCache:
    """Bookkeeping of the KV blocks: reference counts, reusable prefixes, eviction of the least recently used.

    A node names the content of a whole prefix. A full block is published under the node before it and its own tokens,
    exactly (no hash that could collide), and gets a node of its own. Every policy version starts from a root node of
    its own, so that what was computed under older weights is never handed out and never extended.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._published: dict[PrefixKey, int] = {}
        self._keys: list[PrefixKey | None] = [None] * num_blocks
        self._nodes = [0] * num_blocks
        self._last_node = 0
        self.root = 0

    @property
    def num_available(self) -> int:
        """Blocks that nobody refers to; those with a cached prefix are evicted when they are needed."""
        return len(self._free) + len(self._evictable)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests refer to."""
        return 1.0 - self.num_available / self.num_blocks

    def find(self, token_ids: Sequence[int]) -> Prefix:
        """The longest cached prefix that leaves at least one token to compute. Takes no references."""
        blocks: list[int] = []
        node = self.root
        size = self.block_size
        for end in range(size, len(token_ids), size):
            block = self._published.get((node, tuple(token_ids[end - size : end])))
            if block is None:
                break
            blocks.append(block)
            node = self._nodes[block]
        return Prefix(blocks, node)

    def num_unreferenced(self, blocks: list[int]) -> int:
        """How many of these cached blocks count as available."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: list[int]) -> None:
        """Refer to cached blocks once more."""
        for block in blocks:
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Blocks of one's own, with one reference each."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give up one reference to each; the last blocks of a prefix are evicted before its first ones."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} is released more often than referred to"
            if self._references[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def publish(self, node: int, token_ids: Sequence[int], block: int) -> int:
        """Offer a full block, whose prefix before it is `node`, for reuse; returns the node of the prefix with it.

        Where the same content is published already, that block stays the one that is handed out.
        """
        if not self._prefix_cache or node < self.root:
            return -1
        key = (node, tuple(token_ids))
        known = self._published.get(key)
        if known is not None:
            return self._nodes[known]
        assert self._keys[block] is None, f"block {block} is published twice"
        self._last_node += 1
        self._published[key] = block
        self._keys[block] = key
        self._nodes[block] = self._last_node
        return self._last_node

    def start_version(self) -> None:
        """The weights changed: nothing computed so far is handed to new requests, or extended by running ones."""
        self._last_node += 1
        self.root = self._last_node
        for block in self._published.values():
            self._keys[block] = None
        self._published.clear()
        self._free.extend(self._evictable)
        self._evictable.clear()

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._published[key]
        self._keys[block] = None
        return block
