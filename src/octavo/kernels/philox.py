"""Random words by counter: Philox4x32-10, several counters to a vector (Salmon et al., Parallel Random Numbers, SC 2011)."""

from __future__ import annotations

from octavo.kernels.element import U64, compiled, inlined
from octavo.kernels.memory import wide_vectors

__all__ = ["fill_random"]

LOW, WORD = U64(0xFFFFFFFF), U64(32)


@inlined
def _round(c0, c1, c2, c3, k0, k1):
    """A round of Philox4x32.  Products read the lower halves alone; the upper ones may hold anything, which spares a mask."""
    p0, p1 = U64(0xD2511F53) * (c0 & LOW), U64(0xCD9E8D57) * (c2 & LOW)
    return (p1 >> WORD) ^ c1 ^ k0, p1, (p0 >> WORD) ^ c3 ^ k1, p0


@compiled
def fill_random(pairs, blocks, first, seed):
    """Philox4x32-10: four words for each of `blocks` counters from `first` on, two to an element of pairs (uint64).

    Two counters take turns, since a round waits for the products of the last.  An odd number of blocks writes one more.
    """
    wide_vectors()
    half = (blocks + 1) // 2
    for b in range(half):
        one = U64(first) + U64(b)
        two = one + U64(half)
        c0, c1, c2, c3 = one, one >> WORD, U64(0), U64(0)
        d0, d1, d2, d3 = two, two >> WORD, U64(0), U64(0)
        k0, k1 = U64(seed) & LOW, U64(seed) >> WORD
        for _ in range(10):
            c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
            d0, d1, d2, d3 = _round(d0, d1, d2, d3, k0, k1)
            k0, k1 = (k0 + U64(0x9E3779B9)) & LOW, (k1 + U64(0xBB67AE85)) & LOW
        pairs[2 * b] = (c0 & LOW) | (c1 << WORD)
        pairs[2 * b + 1] = (c2 & LOW) | (c3 << WORD)
        pairs[2 * (half + b)] = (d0 & LOW) | (d1 << WORD)
        pairs[2 * (half + b) + 1] = (d2 & LOW) | (d3 << WORD)
