"""The random bits: Philox's known answers, and that a draw depends on its position alone."""

import numpy as np
import pytest

from octavo.rounding import philox, random_bits

WORD = 0xFFFFFFFF


def scalar_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers: ten rounds, the key bumped between them."""
    (a, b, c, d), (key0, key1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ key0, right & WORD, (left >> 32) ^ d ^ key1, left & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return a, b, c, d


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((WORD,) * 4, (WORD,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    expected = tuple(int(word, 16) for word in answer.split())
    assert tuple(philox(np.array(counter, np.uint32), key)) == expected
    assert scalar_philox(counter, key) == expected


def test_philox_takes_counters_of_any_shape() -> None:
    counters = np.random.default_rng(0).integers(0, 1 << 32, (3, 5, 4), np.uint32)
    words = philox(counters, (7, 9))
    assert (words.dtype, words.shape) == (np.uint32, (3, 5, 4))
    for index in np.ndindex(3, 5):
        assert tuple(words[index]) == scalar_philox(tuple(map(int, counters[index])), (7, 9))


@pytest.mark.parametrize("seed", [0, 1, WORD, 1 << 32, 0xDEADBEEF_00000001, (1 << 64) - 1])
@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 1000003, (1 << 34) - 1, 1 << 34, (1 << 40) + 6])
def test_element_p_takes_word_p_mod_4_of_counter_p_div_4(seed: int, position: int) -> None:
    block, word = divmod(position, 4)
    expected = scalar_philox((block & WORD, block >> 32, 0, 0), (seed & WORD, seed >> 32))[word]
    assert random_bits(seed, position, 1) == expected


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 7, 250])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 17])
def test_bits_at_any_offset_are_the_slice(offset: int, count: int) -> None:
    whole = random_bits(5, 0, 300)
    bits = random_bits(5, offset, count)
    assert (bits.dtype, bits.shape) == (np.uint32, (count,))
    assert np.array_equal(bits, whole[offset : offset + count])


def test_counters_carry_into_their_second_word() -> None:
    edge = 1 << 34
    whole = random_bits(5, edge - 6, 12)
    assert np.array_equal(whole[6:], random_bits(5, edge, 6))
    assert not np.array_equal(random_bits(5, edge, 6), random_bits(5, 0, 6))


@pytest.mark.parametrize("seed", [0, 3, 1 << 31, WORD])
def test_the_upper_half_of_a_seed_counts(seed: int) -> None:
    assert not np.array_equal(random_bits(seed, 0, 8), random_bits(seed + (1 << 32), 0, 8))


def test_every_bit_is_set_half_of_the_time() -> None:
    bits = random_bits(11, 0, 1 << 16)
    for place in range(32):
        ones = int(((bits >> np.uint32(place)) & np.uint32(1)).sum())
        assert abs(ones - (1 << 15)) < 4.5 * 128, place  # sigma = sqrt(2**16) / 2 = 128
