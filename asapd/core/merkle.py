"""The Merkle tree of RFC 6962 (section 2.1) over the log: roots, proofs, and what verifies them.

A leaf is SHA-256(0x00 || data) with the 32-byte hash of an entry as data, an inner node SHA-256(0x01 || left || right).
Nodes are named by level (leaves are 0) and index; only complete subtrees have a name, and those never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

import msgspec

EMPTY_ROOT = sha256(b"").digest()
"""The root of a tree without leaves."""

KEPT_LEVEL = 8
"""Nodes from this level on are worth keeping: two for every 256 leaves. What is below is made from the leaves again."""

Node = Callable[[int, int], bytes]
"""The hash of a complete subtree by level and index."""

MadeNode = tuple[int, int, bytes]
"""Level, index and hash of a node that a growing tree completed."""


def leaf_hash(data: bytes) -> bytes:
    """The leaf over the hash of an entry."""
    return sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The parent of two nodes."""
    return sha256(b"\1" + left + right).digest()


class Tree(msgspec.Struct, frozen=True):
    """The right edge of a tree, which is all it takes to grow it: the roots of its complete subtrees, largest first."""

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def root(self) -> bytes:
        """The root over all leaves so far."""
        if not self.peaks:
            return EMPTY_ROOT
        root = self.peaks[-1]
        for peak in self.peaks[-2::-1]:
            root = node_hash(peak, root)
        return root


def grow(tree: Tree, entries: Iterable[bytes]) -> tuple[Tree, list[MadeNode]]:
    """The tree with leaves over these entry hashes added, and the nodes to keep that they completed."""
    size, peaks = tree.size, list(tree.peaks)
    made: list[MadeNode] = []
    digest = sha256
    for entry in entries:
        node = digest(b"\0" + entry).digest()
        below, level = size, 0
        while below & 1:
            node = digest(b"\1" + peaks.pop() + node).digest()
            below >>= 1
            level += 1
            if level >= KEPT_LEVEL:
                made.append((level, below, node))
        peaks.append(node)
        size += 1
    return Tree(size, tuple(peaks)), made


def subtree(leaves: Sequence[bytes], level: int, index: int) -> bytes:
    """A node made from the leaf hashes it covers; `leaves` begins with the leaf `index << level`."""
    row = list(leaves[: 1 << level])
    if len(row) != 1 << level:
        raise KeyError((level, index))
    while len(row) > 1:
        row = [sha256(b"\1" + left + right).digest() for left, right in zip(row[::2], row[1::2], strict=True)]
    return row[0]


def edge(size: int, node: Node) -> Tree:
    """The right edge of the tree over the first `size` leaves."""
    peaks = []
    begin = 0
    for level in range(size.bit_length() - 1, -1, -1):
        if size >> level & 1:
            peaks.append(node(level, begin >> level))
            begin += 1 << level
    return Tree(size, tuple(peaks))


def _split(count: int) -> int:
    """The largest power of two below a count of at least 2."""
    return 1 << (count - 1).bit_length() - 1


def _over(begin: int, end: int, node: Node) -> bytes:
    """MTH(D[begin:end]), where `begin` is a multiple of the power of two that covers the range."""
    count = end - begin
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return node(level, begin >> level)
    half = _split(count)
    return node_hash(_over(begin, begin + half, node), _over(begin + half, end, node))


def root_of(size: int, node: Node) -> bytes:
    """The root over the first `size` leaves."""
    return _over(0, size, node) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, node: Node) -> list[bytes]:
    """PATH(index, D[size]) of RFC 6962 section 2.1.1: what proves the leaf `index` (from 0), the lowest first.

    Raises:
        ValueError: there is no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    path: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        half = begin + _split(end - begin)
        if index < half:
            path.append(_over(half, end, node))
            end = half
        else:
            path.append(_over(begin, half, node))
            begin = half
    return path[::-1]


def consistency_proof(first: int, second: int, node: Node) -> list[bytes]:
    """PROOF(first, D[second]) of RFC 6962 section 2.1.2: proves that the smaller tree is the beginning of the larger.

    Raises:
        ValueError: `first` is 0 or larger than `second`.
    """
    if not 0 < first <= second:
        raise ValueError(f"no proof leads from {first} to {second} leaves")
    path: list[bytes] = []
    begin, end, is_known = 0, second, True
    while first != end:
        half = begin + _split(end - begin)
        if first <= half:
            path.append(_over(half, end, node))
            end = half
        else:
            path.append(_over(begin, half, node))
            begin, is_known = half, False
    if not is_known:
        path.append(_over(begin, end, node))
    return path[::-1]


def includes(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether a proof shows that `leaf` is the leaf `index` of the tree with this root (RFC 9162 section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    at, last, node = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if at & 1 or at == last:
            node = node_hash(sibling, node)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        at, last = at >> 1, last >> 1
    return last == 0 and node == root


def is_consistent(first: int, second: int, proof: Sequence[bytes], first_root: bytes, second_root: bytes) -> bool:
    """Whether a proof shows that a tree with the first root grew into one with the second (RFC 9162 section 2.1.4.2).

    Every tree grows from the empty one, which needs no proof; neither do trees of one size.
    """
    if not 0 <= first <= second:
        return False
    if first == second:
        return not proof and first_root == second_root
    if first == 0:
        return not proof and first_root == EMPTY_ROOT
    path = list(proof)
    if first & (first - 1) == 0:
        path.insert(0, first_root)
    if not path:
        return False
    at, last = first - 1, second - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    old = new = path[0]
    for node in path[1:]:
        if last == 0:
            return False
        if at & 1 or at == last:
            old, new = node_hash(node, old), node_hash(node, new)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            new = node_hash(new, node)
        at, last = at >> 1, last >> 1
    return last == 0 and old == first_root and new == second_root
