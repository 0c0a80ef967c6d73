"""What a comparison writes: strict JSON, a picture, and a page that needs nothing else."""

import base64
import dataclasses
import getpass
import html.parser
import json
import math
import platform
import re
import struct
from pathlib import Path

import pytest

from octavo.lab import report
from octavo.lab.arms import ArmResult
from octavo.lab.compare import CompareConfig, Comparison
from octavo.lab.data import Source
from octavo.lab.models import ModelName


def arm(name: str, *, epochs: int = 3, accuracy: float = 0.97, **more) -> ArmResult:
    losses = tuple(2.0 * math.exp(-step / 20) + 0.01 for step in range(epochs * 20))
    accuracies = tuple(accuracy - 0.01 * (epochs - 1 - epoch) for epoch in range(epochs))
    fields = {
        "description": f"what {name} does",
        "final_loss": 0.0123456,
        "test_loss": 0.1,
        "test_accuracy": accuracy,
        "seconds_per_epoch": 2.0,
        "losses": losses,
        "accuracies": accuracies,
    }
    return ArmResult(name=name, **{**fields, **more})


def example(*arms: ArmResult) -> Comparison:
    config = CompareConfig(source=Source.DIGITS, model=ModelName.MLP)
    empty = Comparison(
        config=config,
        training=config.training(1437),
        data={"name": "digits", "training images": 1437, "test images": 360},
        steps_per_epoch=20,
    )
    for result in arms:
        empty = empty.adding(result)
    return empty


THREE = example(
    arm("torch-fp32", ratio_to_fp32=1.0),
    arm("torch-fp8", accuracy=0.9675, seconds_per_epoch=3.0, ratio_to_fp32=1.5),
    arm("torch-fp8-infer", accuracies=(0.9705,), test_accuracy=0.9705, trained_as="torch-fp32", ratio_to_fp32=1.0),
)


def strict(path: Path) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_rows_print_per_cent_points_and_ratios() -> None:
    assert report.rows(THREE) == [
        ("torch-fp32", "0.0123", "97.00%", "+0.00", "2", "1.00"),
        ("torch-fp8", "0.0123", "96.75%", "-0.25", "3", "1.50"),
        ("torch-fp8-infer", "0.0123", "97.05%", "+0.05", "2", "1.00"),
    ]
    assert all(len(row) == len(report.HEADINGS) for row in report.rows(THREE))


def test_rows_without_float32_have_no_ratio() -> None:
    assert report.rows(example(arm("torch-fp8"))) == [("torch-fp8", "0.0123", "97.00%", "-", "2", "-")]


def test_write_leaves_three_whole_files(tmp_path: Path) -> None:
    report.write(tmp_path, THREE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "report.html", "results.json"]


def test_results_hold_what_the_comparison_found(tmp_path: Path) -> None:
    report.write_results(tmp_path, THREE)
    results = strict(tmp_path / "results.json")
    assert results.keys() == {"arms", "environment", "config", "data"}
    assert [one["name"] for one in results["arms"]] == ["torch-fp32", "torch-fp8", "torch-fp8-infer"]
    fp8 = results["arms"][1]
    assert (fp8["final_loss"], fp8["test_accuracy"], fp8["seconds_per_epoch"]) == (0.0123456, 0.9675, 3.0)
    assert fp8["ratio_to_fp32"] == 1.5
    assert fp8["difference_to_fp32"] == 0.9675 - 0.97
    assert len(fp8["losses"]) == 60
    assert results["config"]["model"] == "mlp"
    assert results["config"]["optimizer"] == "sgd"
    assert results["data"]["training images"] == 1437


def test_results_that_are_not_json_are_refused_and_the_old_ones_stay(tmp_path: Path) -> None:
    report.write_results(tmp_path, THREE)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_results(tmp_path, example(arm("torch-fp32", final_loss=float("nan"))))
    assert (tmp_path / "results.json").read_bytes() == before


def test_the_environment_says_what_a_number_depends_on_and_nothing_private() -> None:
    environment = report.environment()
    wanted = {"date", "hardware", "cores", "torch threads", "system", "python", "octavo", "torch", "numba", "numpy"}
    assert environment.keys() == wanted
    assert all(value not in ("", "not installed") for value in environment.values())
    text = json.dumps(environment)
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert platform.node() not in environment.values()
    assert getpass.getuser() not in environment.values()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", str(environment["date"]))


@pytest.mark.parametrize(
    "comparison",
    [
        THREE,
        example(arm("torch-fp8", epochs=1)),
        example(arm("torch-fp32", epochs=1), arm("torch-fp8-infer", epochs=1)),
        example(arm("torch-fp32", losses=(2.3,), accuracies=(0.1,))),
        example(*(arm(f"torch-{number}") for number in range(12))),
    ],
    ids=["three", "one arm", "one epoch", "one step", "many"],
)
def test_the_picture_is_a_png_wide_enough_to_read(comparison: Comparison) -> None:
    picture = report.curves(comparison)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 1400
    assert height >= 600


class Page(html.parser.HTMLParser):
    """Collects cells, and whatever would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_page_needs_no_other_file_and_shows_the_table_and_the_picture(tmp_path: Path) -> None:
    report.write(tmp_path, THREE)
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    assert "link" not in page.tags
    (picture,) = page.links
    encoded = picture.removeprefix("data:image/png;base64,")
    assert base64.b64decode(encoded) == (tmp_path / "curves.png").read_bytes()
    for row in report.rows(THREE):
        assert all(cell in page.words for cell in row)
    for value in report.environment().values():
        assert str(value) in page.words or " UTC" in str(value)


def test_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    hostile = dataclasses.replace(THREE, arms=(arm("<b>x</b>", description="<script>alert(1)</script>"),))
    report.write(tmp_path, hostile)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
