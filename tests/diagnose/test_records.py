"""Records of casts: what each writer leaves behind, which are the worst, the page about them, and tensors kept whole."""

import base64
import dataclasses
import html.parser
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import octavo
from octavo.diagnose import page, records
from octavo.diagnose.dumps import Dumps
from octavo.diagnose.records import JsonLines, Memory, Record, TensorBoard, read_json_lines, table, worst
from octavo.diagnose.statistics import TensorStatistics, measure
from octavo.formats import E4M3FN, E5M2


def statistics(**changed: Any) -> TensorStatistics:
    plain: dict[str, Any] = {
        "count": 100,
        "amax": 3.5,
        "nan": 0,
        "inf": 0,
        "zeros": 10,
        "underflow": 0.25,
        "overflow": 0.01,
        "sqnr_db": 31.25,
        "exponents": ((-3, 60), (0, 20), (1, 10)),
        "format": "float8_e4m3fn",
        "scale": 128.0,
    }
    return TensorStatistics(**{**plain, **changed})


def record(step: int = 0, module: str = "fc1", tensor: str = "input", **changed: Any) -> Record:
    return Record(step, module, tensor, statistics(**changed))


def same(one: Record, other: Record) -> bool:
    """Equal, NaN to NaN."""
    return repr(one) == repr(other)


def strict(line: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return found


def test_memory_keeps_what_it_is_given() -> None:
    with Memory() as memory:
        memory.write(3, "fc1", "weight", statistics())
        memory.write(4, "", "input", statistics(amax=1.0))
    assert memory.records == [record(3, "fc1", "weight"), record(4, "", "input", amax=1.0)]


def test_a_line_of_json_holds_every_field(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "casts.jsonl") as writer:
        writer.write(12, "layers.0", "grad_output", statistics())
        (line,) = (tmp_path / "casts.jsonl").read_text().splitlines()  # before it is closed
    assert strict(line) == {
        "step": 12,
        "module": "layers.0",
        "tensor": "grad_output",
        "count": 100,
        "amax": 3.5,
        "nan": 0,
        "inf": 0,
        "zeros": 10,
        "underflow": 0.25,
        "overflow": 0.01,
        "sqnr_db": 31.25,
        "exponents": [[-3, 60], [0, 20], [1, 10]],
        "format": "float8_e4m3fn",
        "scale": 128.0,
    }


def test_json_is_strict_where_numbers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "casts.jsonl"
    odd = [record(sqnr_db=math.nan, overflow=math.nan, scale=None), record(sqnr_db=math.inf), record(exponents=())]
    with JsonLines(path) as writer:
        for one in odd:
            writer.write(one.step, one.module, one.tensor, one.statistics)
    lines = [strict(line) for line in path.read_text().splitlines()]
    assert [line["sqnr_db"] for line in lines] == [None, "Infinity", 31.25]
    assert (lines[0]["overflow"], lines[0]["scale"]) == (None, None)
    assert all(same(*pair) for pair in zip(read_json_lines(path), odd, strict=True))


@given(
    step=st.integers(0, 2**53),
    module=st.text(),
    amax=st.floats(0, 3.4e38),
    sqnr_db=st.floats(),
    overflow=st.floats(0, 1) | st.just(math.nan),
    scale=st.none() | st.floats(min_value=1e-30, max_value=1e38),
    exponents=st.dictionaries(st.integers(-149, 127), st.integers(1, 2**40)),
)
def test_any_record_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, step: int, module: str, exponents: dict[int, int], **changed: Any
) -> None:
    one = record(step, module, "weight", exponents=tuple(sorted(exponents.items())), **changed)
    path = tmp_path_factory.mktemp("records") / "casts.jsonl"
    with JsonLines(path) as writer:
        writer.write(one.step, one.module, one.tensor, one.statistics)
    strict(path.read_text())
    (got,) = read_json_lines(path)
    assert same(got, one)


def test_what_was_measured_comes_back_from_json(tmp_path: Path) -> None:
    x = np.array([0, 1, 1000, np.nan, np.inf, 1e-9, 3.3], np.float32)
    found = measure(x, octavo.quantize(x, E4M3FN), E4M3FN)
    with JsonLines(tmp_path / "new" / "folders" / "casts.jsonl") as writer:
        writer.write(np.int64(7), "fc", "input", found)
    assert read_json_lines(os.fspath(tmp_path / "new" / "folders" / "casts.jsonl")) == [Record(7, "fc", "input", found)]


def test_a_second_writer_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with JsonLines(tmp_path / "casts.jsonl") as writer:
            writer.write(step, "fc1", "input", statistics())
    assert read_json_lines(tmp_path / "casts.jsonl") == [record(1), record(2)]


def test_writing_after_the_end_is_an_error(tmp_path: Path) -> None:
    writer = JsonLines(tmp_path / "casts.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed file"):
        writer.write(0, "fc1", "input", statistics())


def test_json_lines_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "casts.jsonl"):
        with pytest.raises(ValueError, match=r"cannot be written \(.+\); choose a writable file$") as caught:
            JsonLines(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ['{"step": 3, "modu', "[]", "3", "", '{"step": 3, "module": "a", "tensor": "b"}', "nonsense"],
    ids=["cut off", "list", "number", "empty", "no statistics", "no JSON"],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "casts.jsonl"
    with JsonLines(path) as writer:
        writer.write(0, "fc1", "input", statistics())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"casts\.jsonl:2: cut off, or no record of a cast \(.*\); remove the line$"):
        read_json_lines(path)


def test_a_missing_file_of_records_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file; check the path"):
        read_json_lines(tmp_path / "none.jsonl")


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(os.fspath(folder), size_guidance={"histograms": 0}).Reload()


def test_tensorboard_reads_the_scalars_and_the_exponents(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as writer:
        writer.write(10, "layers.0", "input", statistics())
        writer.write(20, "layers.0", "input", statistics(sqnr_db=math.inf, underflow=0.0, scale=None, exponents=()))
        writer.write(20, "", "weight", statistics(exponents=((5, 3),)))
    found = events(tmp_path)
    curves = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    named = {tag.removeprefix("layers.0/input/") for tag in curves if tag.startswith("layers.0/input/")}
    assert named == {"amax", "nan", "inf", "underflow", "overflow", "sqnr_db", "scale"}
    assert {tag for tag in curves if not tag.startswith("layers.0/")} == {f"weight/{name}" for name in named}
    assert curves["layers.0/input/underflow"] == [(10, 0.25), (20, 0.0)]
    assert curves["layers.0/input/sqnr_db"] == [(10, 31.25)]
    assert curves["layers.0/input/scale"] == [(10, 128.0)]
    (histogram,) = found.Histograms("layers.0/input/exponents")
    value = histogram.histogram_value
    assert (histogram.step, value.min, value.max, value.num) == (10, -3, 1, 90)
    assert (value.sum, value.sum_squares) == (-180 + 10, 540 + 10)
    counts = dict(zip(value.bucket_limit, value.bucket, strict=True))
    assert counts == {-3.5: 0, -2.5: 60, -1.5: 0, -0.5: 0, 0.5: 20, 1.5: 10}
    (single,) = found.Histograms("weight/exponents")
    assert list(single.histogram_value.bucket) == [0, 3]


def test_a_writer_that_was_given_stays_open(tmp_path: Path) -> None:
    own = SummaryWriter(os.fspath(tmp_path))
    with TensorBoard(own) as writer:
        writer.write(1, "fc1", "input", statistics())
    own.add_scalar("loss", 0.5, 2)
    own.close()
    assert {"loss", "fc1/input/amax"} <= set(events(tmp_path).Tags()["scalars"])


def test_what_is_no_tensorboard_writer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got list: give a SummaryWriter or a folder$"):
        TensorBoard([])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.+\); choose a writable folder$"):
        TensorBoard(tmp_path / "file" / "folder")


def test_the_worst_have_the_lowest_ratio() -> None:
    given = [record(module=str(sqnr), sqnr_db=float(sqnr)) for sqnr in (30, 10, 50, -5, 20)]
    assert [one.module for one in worst(given)] == ["-5", "10", "20", "30", "50"]
    assert [one.module for one in worst(given, 2)] == ["-5", "10"]
    assert worst([]) == []


def test_the_worst_lose_the_most_at_either_end() -> None:
    given = [
        record(module="exact", sqnr_db=math.inf, underflow=0.0, overflow=0.0),
        record(module="zero", sqnr_db=math.nan, underflow=0.0, overflow=0.0),
        record(module="over", sqnr_db=30.0, underflow=0.1, overflow=0.5),
        record(module="under", sqnr_db=30.0, underflow=0.3, overflow=0.0),
        record(module="unknown", sqnr_db=30.0, underflow=0.1, overflow=math.nan),
        record(module="poisoned", sqnr_db=50.0, underflow=0.0, overflow=0.0, nan=1),
    ]
    assert [one.module for one in worst(given)] == ["poisoned", "over", "under", "unknown", "exact", "zero"]
    assert records.harm(statistics(sqnr_db=20.0, underflow=0.5, overflow=0.25)) == pytest.approx(0.76)


def test_each_tensor_is_among_the_worst_once_at_its_worst_step() -> None:
    ratios = {
        ("fc1", "input"): [30.0, 12.0, 25.0],
        ("fc1", "weight"): [20.0, 20.0, 20.0],
        ("fc2", "input"): [5.0, 9.0, 8.0],
    }
    given = [record(step, *place, sqnr_db=ratio[step]) for step in range(3) for place, ratio in ratios.items()]
    found = [(one.step, one.module, one.tensor) for one in worst(iter(given))]
    assert found == [(0, "fc2", "input"), (1, "fc1", "input"), (0, "fc1", "weight")]


def test_the_table_is_aligned() -> None:
    given = [
        record(5, "layers.10", "grad_output", format="float8_e5m2", underflow=1.0, amax=1234.5678),
        record(100, "", "input", overflow=0.0, underflow=2.5e-06, sqnr_db=math.nan),
        record(0, "fc", "weight", overflow=math.nan, sqnr_db=math.inf),
    ]
    assert table(given).splitlines() == [
        "step  module     tensor       format         amax  underflow %  overflow %  SQNR dB",
        "-----------------------------------------------------------------------------------",
        "   5  layers.10  grad_output  float8_e5m2    1235       100.00        1.00     31.2",
        " 100  -          input        float8_e4m3fn   3.5       0.0003        0.00        -",
        "   0  fc         weight       float8_e4m3fn   3.5        25.00           -      inf",
    ]
    assert len(table([]).splitlines()) == 2


def some_records() -> list[Record]:
    random = np.random.default_rng(4)
    memory = Memory()
    for step in (0, 10, 20):
        for layer in range(10):
            x = (random.standard_normal(400) * 2.0**-layer).astype(np.float32)
            memory.write(step, f"layers.{layer}", "input", measure(x, octavo.quantize(x, E5M2), E5M2))
    return memory.records


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


def test_the_page_needs_no_other_file_and_shows_the_worst_and_a_picture(tmp_path: Path) -> None:
    given = some_records()
    page.write(tmp_path / "new" / "casts.html", given)
    shown = Page((tmp_path / "new" / "casts.html").read_text(encoding="utf-8"))
    assert not {"script", "link"} & shown.tags
    (image,) = shown.links
    content = base64.b64decode(image.removeprefix("data:image/png;base64,"), validate=True)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1400
    assert height >= 600
    for row in records.rows(worst(given)):
        assert all(cell in shown.words for cell in row)
    assert "What casts lose: 10 of 10 tensors, worst first" in shown.words


@pytest.mark.parametrize(
    "given",
    [
        [record(sqnr_db=math.inf, underflow=0.0, exponents=(), scale=None)],
        [record(step, sqnr_db=math.nan, format="float8_of_ours") for step in range(3)],
        [record(module=f"${'very.' * 30}{number}$_^{{") for number in range(30)],
    ],
    ids=["nothing to draw", "a format of one's own", "names"],
)
def test_a_page_can_be_made_of_any_records(tmp_path: Path, given: list[Record]) -> None:
    page.write(tmp_path / "casts.html", given)
    assert "data:image/png" in (tmp_path / "casts.html").read_text(encoding="utf-8")


def test_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    page.write(tmp_path / "casts.html", [record(module="<script>alert(1)</script>")])
    text = (tmp_path / "casts.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_page_without_records_or_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a page shows records of casts; got none: record some steps first$"):
        page.write(tmp_path / "casts.html", [])
    with pytest.raises(ValueError, match=r"cannot be written \(.+\); choose a writable folder$"):
        page.write(tmp_path, [record()])


def test_dumps_choose_by_step_and_by_name() -> None:
    each = Dumps("dumps", every=100)
    assert [step for step in range(301) if each.wants(step, "fc1", "input")] == [0, 100, 200, 300]
    some = Dumps("dumps", patterns=["encoder.*.weight", "head.*", "input"], steps=range(5, 7))
    assert [step for step in range(301) if some.wants(step, "head", "grad_output")] == [5, 6]
    assert some.wants(5, "encoder.0.fc", "weight")
    assert not some.wants(5, "encoder.0.fc", "input")
    assert not some.wants(5, "Head", "input")
    assert some.wants(5, "", "input")
    assert not some.wants(4, "head", "input")
    assert not Dumps("dumps", steps=()).wants(0, "fc1", "input")


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float16, np.bool_, np.int64])
def test_a_dump_holds_the_array(tmp_path: Path, dtype: Any) -> None:
    dumps = Dumps(tmp_path / "new" / "dumps", every=1)
    array = np.arange(12).reshape(3, 4).astype(dtype)[:, ::2]
    path = dumps.write(12, "layers.0.fc1", "grad_output", array)
    assert path == tmp_path / "new" / "dumps" / "step-00000012" / "layers.0.fc1.grad_output.npy"
    got = np.load(path, allow_pickle=False)
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    dumps.write(12, "layers.0.fc1", "grad_output", array[:1])
    assert np.load(path).shape == (1, 2)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_every_bit_of_a_dump_is_kept(tmp_path: Path) -> None:
    x = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], np.float32)
    got = np.load(Dumps(tmp_path, every=1).write(0, "", "input", x))
    np.testing.assert_array_equal(got.view(np.uint32), x.view(np.uint32))
    assert (tmp_path / "step-00000000" / "input.npy").exists()


def test_names_of_modules_are_made_safe_and_stay_different(tmp_path: Path) -> None:
    dumps = Dumps(tmp_path, every=1)
    names = ["a/b", "a_b", "a%2Fb", "../../a", "a b", 'a\\b:*?"<>|', "é"]
    paths = [dumps.write(3, name, "weight", np.float32(number).reshape(1)) for number, name in enumerate(names)]
    assert {path.parent for path in paths} == {tmp_path / "step-00000003"}
    assert [float(np.load(path)[0]) for path in paths] == [0, 1, 2, 3, 4, 5, 6]
    for path in paths:
        assert path.name.isascii()
        assert not set(path.name) & set('/\\:*?"<>| ')


def test_dumps_are_settings() -> None:
    dumps = Dumps("dumps", patterns=["fc1.*"], steps=[3, 1, 3])
    assert dumps == Dumps(Path("dumps"), patterns=("fc1.*",), steps=(1, 3))
    assert hash(dumps) == hash(dataclasses.replace(dumps))
    with pytest.raises(dataclasses.FrozenInstanceError):
        dumps.every = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got neither: give one, every=100, say"),
        ({"every": 3, "steps": (1,)}, "got both: give one, every=100, say"),
        ({"every": 0}, "every is 1 or more steps; got 0: write every=1 for each step"),
        ({"every": -5}, "every is 1 or more steps; got -5: write every=1 for each step"),
        ({"every": 1, "patterns": "fc1.*"}, r"patterns is a sequence of patterns; got 'fc1\.\*': write \('fc1\.\*',\)"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}$") as caught:
        Dumps(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "dumps"):
        with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\); choose a writable folder$"):
            Dumps(path, every=1)
    dumps = Dumps(tmp_path / "dumps", every=1)
    (tmp_path / "dumps").touch()
    with pytest.raises(ValueError, match=r"fc1\.input\.npy: cannot be written \(.+\); choose a writable folder$"):
        dumps.write(0, "fc1", "input", np.zeros(1, np.float32))


def test_what_a_file_of_numpy_does_not_hold_is_refused(tmp_path: Path) -> None:
    dumps = Dumps(tmp_path, every=1)
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, object):
        with pytest.raises(ValueError, match=r"NumPy's own; fc1\.input is \w+: convert it first$"):
            dumps.write(0, "fc1", "input", np.zeros(1, dtype))
    with pytest.raises(ValueError, match="step is an integer from 0 to"):
        dumps.write(-1, "fc1", "input", np.zeros(1, np.float32))
    assert list(tmp_path.iterdir()) == []
