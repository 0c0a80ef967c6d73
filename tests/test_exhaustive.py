"""`make exhaustive` on a few blocks, and that it would find what it looks for."""

from __future__ import annotations

import io
import sys

import exhaustive
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

import octavo
from octavo.formats import E4M3FN, E5M2, FORMATS, Format


def test_a_few_blocks_have_no_mismatch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["exhaustive.py", "--formats", "float8_e5m2", "--blocks", "2"])
    assert exhaustive.main() == 0
    assert capsys.readouterr().out.split("\n")[:5] == [
        "numba      float8_e5m2              33,554,432 patterns  0 mismatches",
        "saturated  float8_e5m2              33,554,432 patterns  0 mismatches",
        "values     float8_e5m2              33,554,432 patterns  0 mismatches",
        "xla        float8_e5m2              33,554,432 patterns  0 mismatches",
        "products   float8_e5m2                 561,152 pairs     0 mismatches",
    ]


@pytest.mark.parametrize("left", exhaustive.FACTORS, ids=lambda format: format.name)
def test_every_product_is_exact(left: Format) -> None:
    assert {right.name: exhaustive.inexact_products(left, right) for right in exhaustive.FACTORS} == {
        format.name: 0 for format in FORMATS.values() if format.signed
    }


def test_a_wrong_value_is_found() -> None:
    x = np.array([1, 3, -0.0, np.nan, 1e9], np.float32)
    codes = exhaustive.saturated(x, exhaustive.expected(x, E5M2), E5M2)
    assert exhaustive.mismatches(octavo.quantize(x, E5M2), codes, E5M2).size == 0
    assert exhaustive.mismatches(np.array([1, 3.5, 0, 2, np.inf], np.float32), codes, E5M2).tolist() == [1, 2, 3, 4]


def test_a_wrong_code_is_found_and_named() -> None:
    def toward_zero(x: exhaustive.Floats, format: Format) -> exhaustive.Codes:
        return octavo.encode(x, format, rounding=octavo.Rounding.TOWARD_ZERO, overflow=octavo.Overflow.NONE)

    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console, disable=True) as progress:
        assert not exhaustive.check_casts(E4M3FN, 2, {exhaustive.Backend.NUMBA: toward_zero}, progress, console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "33,554,432 patterns  " in output
    assert " 0 mismatches" not in output
    assert "the first at np.float32(" in output


def test_an_inexact_product_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "exact_values", lambda format: format.values.astype(np.float64) * (1 + 2.0**-30))
    console = Console(file=io.StringIO(), width=200)
    assert not exhaustive.check_products(E5M2, console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"mismatches: {exhaustive.inexact_products(E5M2, E4M3FN):,} of float8_e4m3fn, " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "0"], "--blocks is from 1 to 256; got 0"),
        (["--formats", "float8_e5m3"], "no format is called 'float8_e5m3'"),
        (["--backends", "cuda"], "invalid choice: 'cuda'"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["exhaustive.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        exhaustive.main()
    assert message in capsys.readouterr().err
