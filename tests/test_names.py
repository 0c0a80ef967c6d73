"""Suggestions for mistyped names."""

import pytest

from octavo.names import nearest

ARMS = ("torch-fp32", "torch-bf16", "torch-fp8", "torch-fp8-current")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("torch-fp9", "torch-fp8"),
        ("torch-bf61", "torch-bf16"),
        ("torch_fp32", "torch-fp32"),
        ("fp8-current", "torch-fp8-current"),
    ],
)
def test_nearest_names_what_was_probably_meant(word: str, meant: str) -> None:
    assert nearest(word, ARMS) == f"; did you mean {meant!r}?"


@pytest.mark.parametrize("word", ["", "zzz", "%s\n"])
def test_nearest_says_nothing_where_nothing_is_close(word: str) -> None:
    assert nearest(word, ARMS) == ""


def test_nearest_takes_any_iterable_even_an_empty_one() -> None:
    assert nearest("e4m3", iter(["e4m3fn"])) == "; did you mean 'e4m3fn'?"
    assert nearest("e4m3", []) == ""
