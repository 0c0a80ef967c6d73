"""The documents' programs run as they stand, block after block, with warnings as errors."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/pytorch.md",
    "docs/emulation.md",
    "docs/jax.md",
    "docs/numerics.md",
    "docs/validate.md",
    "docs/compile.md",
    "docs/runs.md",
    "docs/scaling.md",
    "docs/engine.md",
    "docs/engine_ops.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    text = (ROOT / page).read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # its own, as it compiles
        if page == "docs/jax.md":
            from octavo.jax import HighPrecisionWarning

            warnings.simplefilter("ignore", HighPrecisionWarning)  # it shows one
        for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            exec(compile("\n" * line + match[1], page, "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_what_a_page_links_to_is_there(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
