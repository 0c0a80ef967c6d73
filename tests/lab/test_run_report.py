"""What is told of runs: a table of all, and a page about some that needs nothing else."""

import base64
import datetime
import html.parser
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from octavo.lab import run_report
from octavo.lab.run_folder import RunFolder, RunState, Status
from octavo.lab.run_report import find, list_runs, write_report

NOW = datetime.datetime(2026, 1, 31, 12, 0, 0, tzinfo=datetime.UTC)
CONFIG = "model:\n  name: fc\n  hidden_sizes: [500, 300]\noptimizer: {learning_rate: 0.1}\nprecision: fp32\n"


def make(path: Path, *, seconds: int = 0, config: str = CONFIG, **fields: object) -> Path:
    """A run whose last update was `seconds` before NOW."""
    folder = RunFolder.create(path)
    folder.write_config(config)
    folder.write_state(RunState(**{"state": Status.FINISHED, **fields}))
    file = path / "run.json"
    updated = (NOW - datetime.timedelta(seconds=seconds)).isoformat()
    file.write_text(json.dumps({**json.loads(file.read_text()), "updated": updated}))
    return path


def logged(path: Path, losses: list[float], accuracies: list[float], **fields: object) -> Path:
    """A run with a training step for each loss and an evaluation for each accuracy."""
    make(path, step=20 * len(losses), max_steps=1000, precision="fp8_current", backend="torch", **fields)
    folder = RunFolder(path)
    for number, loss in enumerate(losses, 1):
        folder.log_metrics(
            {"step": 20 * number, "kind": "train", "loss": loss, "learning_rate": 0.1, "loss_scale": None}
        )
    for number, accuracy in enumerate(accuracies, 1):
        folder.log_metrics({"step": 40 * number, "kind": "eval", "loss": 0.5 / number, "accuracy": accuracy})
    return path


def test_runs_are_found_at_any_depth_and_hidden_ones_and_checkpoints_are_not(tmp_path: Path) -> None:
    wanted = [make(tmp_path / name) for name in ("b", "a", "a/inner", "deep/er/still")]
    make(tmp_path / ".hidden" / "run")
    make(tmp_path / "a" / "checkpoints" / "no")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert find(tmp_path) == sorted(wanted)
    assert find(tmp_path / "b") == [tmp_path / "b"]
    assert find(tmp_path / "none") == []


def test_the_table_is_aligned_and_the_newest_comes_first(tmp_path: Path) -> None:
    make(
        tmp_path / "old", seconds=3 * 86400, step=1000, max_steps=1000, loss=0.01234, accuracy=0.98315, precision="bf16"
    )
    make(tmp_path / "sub" / "new", seconds=5, state=Status.RUNNING, step=40, loss=12345.0, backend="jax")
    make(tmp_path / "failed", seconds=3600, state=Status.FAILED, max_steps=9, error="NaN in\nfc1.weight")
    assert list_runs(tmp_path, now=NOW).splitlines() == [
        "run      state          step       loss  accuracy  precision  backend  updated",
        "-" * 84,
        "sub/new  running          40  1.234e+04         -  -          jax      5 seconds ago",
        "failed   failed          0/9          -         -  -          -        1 hour ago",
        "old      finished  1000/1000     0.0123    98.31%  bf16       -        3 days ago",
        "",
        "failed: NaN in fc1.weight",
    ]


def test_a_root_that_is_a_run_has_its_own_name(tmp_path: Path) -> None:
    assert list_runs(make(tmp_path / "only"), now=NOW).splitlines()[2].startswith("only  finished")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-60, "just now"),
        (0, "just now"),
        (1, "1 second ago"),
        (59, "59 seconds ago"),
        (60, "1 minute ago"),
        (3599, "59 minutes ago"),
        (7200, "2 hours ago"),
        (86399, "23 hours ago"),
        (86400, "1 day ago"),
        (86400 * 400, "400 days ago"),
    ],
)
def test_ages_are_told_in_words(tmp_path: Path, seconds: int, words: str) -> None:
    assert list_runs(make(tmp_path / "run", seconds=seconds), now=NOW).endswith(f"  {words}")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 9}', None], ids=["cut", "list", "newer", "folder"])
def test_an_unreadable_run_is_listed_last_with_the_reason(tmp_path: Path, text: str | None) -> None:
    make(tmp_path / "good", seconds=10**8)
    bad = tmp_path / "bad" / "run.json"
    bad.parent.mkdir()
    if text is None:
        bad.mkdir()
    else:
        bad.write_text(text)
    lines = list_runs(tmp_path, now=NOW).splitlines()
    assert lines[2].startswith("good  finished")
    assert re.fullmatch(r"bad   unreadable( +-){6}", lines[3])
    assert lines[4] == ""
    assert lines[5].startswith(f"{bad}: ")
    assert len(lines) == 6


def test_a_folder_that_cannot_be_listed_is_named() -> None:
    # Not tmp_path: its parents are closed to the user that a superuser has to become to be refused.
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        make(Path(parent) / "good")
        closed = Path(parent) / "closed"
        closed.mkdir(mode=0)
        program = (
            "import os, pathlib, sys\nfrom octavo.lab.run_report import list_runs\n"
            "os.geteuid() or os.seteuid(65534)\nprint(list_runs(pathlib.Path(sys.argv[1])))"
        )
        command = [sys.executable, "-c", program, parent]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        closed.chmod(0o755)
    lines = output.splitlines()
    assert lines[2].startswith("good  finished")
    assert lines[3:] == ["", f"{closed}: cannot be listed (Permission denied)"]


def test_no_runs_and_no_folder(tmp_path: Path) -> None:
    assert list_runs(tmp_path) == f"no run in {tmp_path}; octavo train CONFIG starts one"
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        ValueError, match=r"rusn: runs are looked for in a folder, there is none; did you mean 'runs'\?"
    ):
        list_runs(tmp_path / "rusn")


class Page(html.parser.HTMLParser):
    """Collects cells and texts, and whatever would be fetched from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if not self.tags:
            return
        self.texts.setdefault(self.tags[-1], []).append(data)
        if self.tags[-1] in ("td", "th") and data.strip():
            self.rows[-1].append(data)

    def picture(self) -> bytes:
        (link,) = self.links
        return base64.b64decode(link.removeprefix("data:image/png;base64,"))


def test_the_page_needs_no_other_file_and_tells_of_each_run(tmp_path: Path) -> None:
    one = logged(tmp_path / "one", [2.0, 1.0, 0.25], [0.5, 0.975, 0.9], loss=0.25, accuracy=0.9)
    two = logged(tmp_path / "two", [2.0, math.nan], [], state=Status.FAILED, error="NaN in fc1.weight")
    out = write_report([one, two], tmp_path / "pages" / "page.html")
    assert out == tmp_path / "pages" / "page.html"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    page = Page(out)
    assert not {"script", "link"} & set(page.tags)
    assert page.rows == [
        ["run", "state", "precision", "backend", "step", "final loss", "evaluation loss", "best accuracy"],
        ["one", "finished", "fp8_current", "torch", "60/1000", "0.2500", "0.1667", "97.50%"],
        ["two", "failed", "fp8_current", "torch", "40/1000", "NaN", "-", "-"],
    ]
    assert "two: NaN in fc1.weight" in page.texts["p"]
    assert "Nothing: they are equal." in page.texts["p"]
    assert [text for text in page.texts["pre"] if text.strip()] == [CONFIG, CONFIG]
    assert page.tags.count("details") == 2


def test_what_differs_in_the_configs_stands_side_by_side(tmp_path: Path) -> None:
    configs = {
        "a": CONFIG,
        "b": "model:\n  name: fc\n  hidden_sizes: [500]\noptimizer: {learning_rate: 0.1, momentum: 0}\nprecision: fp32\n",
        "c": CONFIG.replace("precision: fp32", "precision: 'mxfp8'\nschedules:\n- {kind: step}\n- {kind: cosine}"),
    }
    runs = [make(tmp_path / name, config=text) for name, text in configs.items()]
    page = Page(write_report(runs, tmp_path))
    table = page.rows[len(runs) + 1 :]
    assert table == [
        ["key", "a", "b", "c"],
        ["model.hidden_sizes", "[500, 300]", "[500]", "[500, 300]"],
        ["precision", '"fp32"', '"fp32"', '"mxfp8"'],
        ["optimizer.momentum", "-", "0", "-"],
        ["schedules.0.kind", "-", "-", '"step"'],
        ["schedules.1.kind", "-", "-", '"cosine"'],
    ]


@pytest.mark.parametrize(("one", "two"), [("1", "true"), ("0.1", "'0.1'"), ("1", "1.0"), ("null", "''"), ("{}", "[]")])
def test_values_of_other_types_differ(tmp_path: Path, one: str, two: str) -> None:
    runs = [make(tmp_path / name, config=f"key: {value}\n") for name, value in (("a", one), ("b", two))]
    assert Page(write_report(runs, tmp_path)).rows[-1][0] == "key"


def test_one_run_is_compared_with_nothing_and_a_folder_takes_the_page(tmp_path: Path) -> None:
    out = write_report([make(tmp_path / "run")], tmp_path)
    assert out == tmp_path / "report.html"
    assert "differs" not in out.read_text()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    page = Page(write_report([make(tmp_path / "x" / "run"), make(tmp_path / "y" / "run")], tmp_path))
    assert [row[0] for row in page.rows[1:3]] == ["x/run", "y/run"]


def test_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    run = make(tmp_path / "_<b>$x$", config=f"name: {hostile}\n", state=Status.FAILED, error=hostile)
    text = write_report([run, make(tmp_path / "other")], tmp_path).read_text()
    assert "<script" not in text
    assert "_&lt;b&gt;$x$" in text


@pytest.mark.parametrize(
    ("losses", "accuracies"),
    [
        ([], []),
        ([2.3], [0.1]),
        ([0.0, 0.0], []),
        ([math.nan, math.inf, -math.inf], [math.nan, math.nan]),
        ([2.0, math.nan, 1.0], [0.5, math.nan]),
        ([-1.0, 0.5], [0.0, 1.0]),
        ([math.exp(-step / 9) for step in range(200)], [0.9] * 40),
    ],
    ids=["nothing", "one step", "zeros", "nothing finite", "gaps", "negative", "long"],
)
def test_the_picture_is_a_png_wide_enough_to_read(tmp_path: Path, losses: list[float], accuracies: list[float]) -> None:
    picture = Page(write_report([logged(tmp_path / "run", losses, accuracies)], tmp_path)).picture()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 1400
    assert height >= 800


def test_many_runs_have_looks_of_their_own(tmp_path: Path) -> None:
    looks = [run_report._look(number) for number in range(32)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 32
    runs = [logged(tmp_path / f"run-{number:02}-{'x' * 60}", [2.0, 1.0], [0.5]) for number in range(12)]
    assert Page(write_report(runs, tmp_path)).picture()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["."], "a report shows runs, no run is here; the runs below it are 0, 1, 2, 3, 4, ..."),
        (["0", "few"], "few: a report shows runs, no run is here; the runs below it are a/b"),
        (["empty/rum"], "rum: a report shows runs, no run is here; octavo runs lists"),
        (["few/a/c"], "c: a report shows runs, no run is here; octavo runs lists"),
        (["few/run1"], "run1: a report shows runs, no run is here; did you mean 'run12'?"),
        (["0", "1", "0"], "0: named 2 times; name each run once"),
        (["0", "few/../0"], "0: named 2 times"),
        ([], "a report shows at least one run; got none"),
    ],
)
def test_what_is_no_run_is_refused_with_those_near_it(tmp_path: Path, names: list[str], message: str) -> None:
    for name in (*"012345", "few/a/b"):
        make(tmp_path / name)
    if "few/run1" in names:
        make(tmp_path / "few" / "run12")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_report([tmp_path / name for name in names], tmp_path / "page.html")
    assert "\n" not in str(caught.value)
    assert not tmp_path.joinpath("page.html").exists()


def test_a_run_that_cannot_be_read_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    out = write_report([run], tmp_path)
    before = out.read_bytes()
    for name, text, message in (
        ("config.yaml", "a: [1,\nb: }", r"config\.yaml: not YAML \(.+ line 2, column 4.+\); restore the file$"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl:1: a line of metrics is JSON"),
        ("run.json", "{}", r"run\.json: not the state of a run"),
    ):
        run.joinpath(name).write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            write_report([run], tmp_path)
        assert "\n" not in str(caught.value)
        run.joinpath(name).write_text("")
    assert out.read_bytes() == before


def test_a_page_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(ValueError, match=r"cannot be written \(File exists\); choose a writable folder"):
        write_report([run], run / "config.yaml" / "page.html")
