"""Near duplicates: the index against every pair, and the groups that follow."""

import numpy as np
import pytest

from hotdog_hf.data.similar import NEAR_BITS, near_pairs, similar_groups


def near_in_all_pairs(hashes, bits):
    """Every pair that differs in at most `bits` bits, by comparing each hash with all that follow."""
    found = set()
    for first in range(len(hashes) - 1):
        distances = np.bitwise_count(hashes[first] ^ hashes[first + 1 :])
        found |= {(first, first + 1 + int(k), int(distances[k])) for k in np.flatnonzero(distances <= bits)}
    return found


def flipped(rng, hashes, bits):
    """The hashes with so many bits of each flipped."""
    masks = [sum(1 << int(bit) for bit in rng.choice(64, bits, replace=False)) for _ in hashes]
    return hashes ^ np.array(masks, np.uint64)


def many_hashes(count, seed=0):
    """Half of them at random, the others 1 to 7 bits away from those, in a random order."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 2**64, count // 2, np.uint64)
    copies = [flipped(rng, part, 1 + number) for number, part in enumerate(np.array_split(first, 7))]
    return rng.permutation(np.unique(np.concatenate([first, *copies])))


def like_photos(count, seed=0):
    """Hashes whose bits are likely or unlikely, as those of photos are: many agree in whole parts."""
    rng = np.random.default_rng(seed)
    bits = rng.random((count, 64)) < rng.choice([0.02, 0.3, 0.9, 0.99], 64)
    return rng.permutation(np.unique(np.packbits(bits, axis=1).view(np.uint64)))


@pytest.mark.parametrize(
    ("hashes", "bits"),
    [(many_hashes(20_000), NEAR_BITS), (like_photos(3000), NEAR_BITS), (many_hashes(2000), 1)],
    ids=["20,000", "alike", "1 bit"],
)
def test_the_index_finds_what_all_pairs_find(hashes, bits):
    found = set()
    for firsts, seconds, distances in near_pairs(hashes, bits):
        pairs = np.sort([firsts, seconds], axis=0)
        found |= set(zip(*pairs.tolist(), distances.tolist(), strict=True))
    expected = near_in_all_pairs(hashes, bits)
    assert found == expected and len(expected) > 100


def test_few_hashes_and_equal_ones():
    assert list(near_pairs(np.zeros(0, np.uint64))) == list(near_pairs(np.ones(1, np.uint64))) == []
    assert similar_groups(np.zeros(0, np.uint64)).tolist() == []
    assert similar_groups(np.array([31, 2**63, 31], np.uint64)).tolist() == [0, 1, 0]


def test_groups_are_chains_of_near_hashes_numbered_as_they_appear():
    far = 2**64 - 2**32  # 32 bits away from 0
    chain = [0, 0b1111, 0b11111111]  # 4 bits from one to the next, 8 from end to end
    hashes = np.array([far, chain[2], chain[0], far, chain[1]], np.uint64)
    assert similar_groups(hashes).tolist() == [0, 1, 1, 0, 1]
    assert similar_groups(np.array([chain[2], chain[0]], np.uint64)).tolist() == [0, 1]
