"""The tree against published vectors and against a verifier written from the RFC alone."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core import merkle
from asapd.core.merkle import Tree, grow, leaf_hash

# The entries and roots that implementations of Certificate Transparency test with.
VECTOR_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
VECTOR_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


# --- written from RFC 6962 section 2.1, word for word, and from nothing else


def mth(entries: list[bytes]) -> bytes:
    if not entries:
        return sha256().digest()
    if len(entries) == 1:
        return sha256(b"\x00" + entries[0]).digest()
    k = split(len(entries))
    return sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def path(m: int, entries: list[bytes]) -> list[bytes]:
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


def subproof(m: int, entries: list[bytes], known: bool) -> list[bytes]:
    if m == len(entries):
        return [] if known else [mth(entries)]
    k = split(len(entries))
    if m <= k:
        return [*subproof(m, entries[:k], known), mth(entries[k:])]
    return [*subproof(m - k, entries[k:], False), mth(entries[:k])]


def nodes_of(entries: list[bytes]) -> merkle.Node:
    leaves = [leaf_hash(entry) for entry in entries]
    return lambda level, index: merkle.subtree(leaves[index << level :], level, index)


def hashes(count: int) -> list[bytes]:
    return [sha256(b"%d" % number).digest() for number in range(count)]


@pytest.mark.parametrize("size", range(9))
def test_the_published_roots_come_out(size: int) -> None:
    tree, _ = grow(Tree(), VECTOR_LEAVES[:size])
    assert tree.root().hex() == VECTOR_ROOTS[size] == mth(VECTOR_LEAVES[:size]).hex()
    assert merkle.root_of(size, nodes_of(VECTOR_LEAVES)) == tree.root()


def test_a_published_proof_verifies() -> None:
    """Leaf 5 of 8, from the test vectors of Certificate Transparency."""
    proof = [
        bytes.fromhex(text)
        for text in (
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        )
    ]
    assert merkle.inclusion_proof(5, 8, nodes_of(VECTOR_LEAVES)) == proof
    assert merkle.includes(leaf_hash(VECTOR_LEAVES[5]), 5, 8, proof, bytes.fromhex(VECTOR_ROOTS[8]))


@given(st.lists(st.binary(max_size=4), max_size=40), st.integers(0, 40))
def test_a_tree_grown_in_parts_is_the_tree_of_the_rfc(entries: list[bytes], cut: int) -> None:
    part, _ = grow(Tree(), entries[:cut])
    tree, _ = grow(part, entries[cut:])
    assert tree == grow(Tree(), entries)[0] == merkle.edge(len(entries), nodes_of(entries))
    assert tree.root() == mth(entries)


@given(st.integers(1, 70), st.data())
def test_inclusion_proofs_are_those_of_the_rfc_and_no_other_leaf_place_or_root_fits(
    size: int, data: st.DataObject
) -> None:
    entries = hashes(size)
    index = data.draw(st.integers(0, size - 1))
    proof, root, leaf = merkle.inclusion_proof(index, size, nodes_of(entries)), mth(entries), leaf_hash(entries[index])
    assert proof == path(index, entries)
    assert merkle.includes(leaf, index, size, proof, root)
    assert not any(merkle.includes(leaf, other, size, proof, root) for other in range(-1, size + 1) if other != index)
    assert not merkle.includes(bytes(32), index, size, proof, root)
    assert not merkle.includes(leaf, index, size, proof, bytes(32))
    assert not merkle.includes(leaf, index, size, [*proof, bytes(32)], root)
    assert not proof or not merkle.includes(leaf, index, size, proof[:-1], root)
    for at in range(len(proof)):
        changed = [bytes(32) if number == at else node for number, node in enumerate(proof)]
        assert not merkle.includes(leaf, index, size, changed, root)


@given(st.integers(1, 70), st.data())
def test_consistency_proofs_are_those_of_the_rfc_and_no_other_tree_fits(size: int, data: st.DataObject) -> None:
    entries = hashes(size)
    first = data.draw(st.integers(1, size))
    proof = merkle.consistency_proof(first, size, nodes_of(entries))
    old, new = mth(entries[:first]), mth(entries)
    assert proof == subproof(first, entries, known=True)
    assert merkle.is_consistent(first, size, proof, old, new)
    assert not merkle.is_consistent(first, size, proof, bytes(32), new)
    assert not merkle.is_consistent(first, size, proof, old, bytes(32))
    assert not merkle.is_consistent(first, size, [*proof, bytes(32)], old, new)
    assert not proof or not merkle.is_consistent(first, size, proof[:-1], old, new)
    rewritten = mth([bytes(32), *entries[1:]])
    assert not merkle.is_consistent(first, size, proof, rewritten, new) or first == size == 0
    for at in range(len(proof)):
        changed = [bytes(32) if number == at else node for number, node in enumerate(proof)]
        assert not merkle.is_consistent(first, size, changed, old, new)


def test_every_tree_grows_from_the_empty_one_and_none_shrinks() -> None:
    root = mth(hashes(3))
    assert merkle.is_consistent(0, 3, [], merkle.EMPTY_ROOT, root)
    assert not merkle.is_consistent(0, 3, [], root, root)
    assert not merkle.is_consistent(3, 2, [], root, root)
    assert merkle.is_consistent(3, 3, [], root, root)
    assert not merkle.is_consistent(3, 5, [], root, root)


def test_proofs_of_what_is_not_there_are_refused() -> None:
    node = nodes_of(hashes(4))
    for index in (-1, 4):
        with pytest.raises(ValueError, match="has no leaf"):
            merkle.inclusion_proof(index, 4, node)
    for first in (0, 5):
        with pytest.raises(ValueError, match="no proof leads"):
            merkle.consistency_proof(first, 4, node)
    with pytest.raises(KeyError):
        node(3, 0)


def test_the_nodes_to_keep_are_all_complete_subtrees_from_the_kept_level_on() -> None:
    entries = hashes(1100)
    half, made = grow(Tree(), entries[:300])
    made += grow(half, entries[300:])[1]
    node = nodes_of(entries)
    wanted = {(level, index) for level in range(merkle.KEPT_LEVEL, 12) for index in range(len(entries) >> level)}
    assert {(level, index): digest for level, index, digest in made} == {at: node(*at) for at in wanted}
