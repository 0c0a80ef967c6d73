"""The command line as a user meets it: output, one-line errors and exit codes, from real processes where that matters."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli import _number, main
from octavo.formats import FORMATS
from octavo.lab import checkpoint
from octavo.recipes import NAMED

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "100"}


def octavo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "octavo.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        env=ENVIRONMENT,
    )


def complaint(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on standard error of a command that failed with `code`."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("octavo: ")
    return done.stderr.strip()


class Here:
    """The command line called in this process, which spares the test the imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._monkeypatch, self._capsys, self._folder = monkeypatch, capsys, folder

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self._monkeypatch.chdir(self._folder)
        self._monkeypatch.setattr(sys, "argv", ["octavo", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        out, err = self._capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code, out, err)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    return Here(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["--version"], ["formats", "--help"]])
def test_help_imports_nothing_that_takes_long(arguments: list[str]) -> None:
    script = (
        "import sys; sys.argv = ['octavo', *sys.argv[1:]]\n"
        "from octavo.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'jax', 'numba', 'numpy', 'matplotlib', 'sklearn', 'jinja2', 'ml_dtypes'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"
    assert "octavo" in done.stdout.lower()


def test_no_command_prints_the_help() -> None:
    done = octavo()
    assert done.returncode == 0
    for command in ("compare", "formats", "recipes"):
        assert command in done.stdout


def test_version_is_the_package_s() -> None:
    assert re.fullmatch(r"octavo \d+\.\d+\.\d+\n", octavo("--version").stdout)


def test_formats_prints_one_aligned_row_for_each_format() -> None:
    lines = octavo("formats").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(FORMATS)
    assert len({len(line) for line in lines}) == 1


def test_formats_says_what_the_specification_says() -> None:
    assert octavo("formats", "float8_e4m3fn").stdout.splitlines()[-1].split() == (
        ["float8_e4m3fn", "1.4.3", "7", "448", "2^-6", "2^-9", "no", "yes", "yes"]
    )
    rows = {line.split()[0]: line.split()[1:] for line in octavo("formats").stdout.splitlines()[2:]}
    assert rows["float8_e5m2"] == ["1.5.2", "15", "57344", "2^-14", "2^-16", "yes", "yes", "yes"]
    assert rows["float8_e4m3fnuz"] == ["1.4.3", "8", "240", "2^-7", "2^-10", "no", "yes", "no"]
    assert rows["float8_e8m0fnu"] == ["0.8.0", "127", "2^127", "2^-127", "none", "no", "yes", "no"]
    assert rows["float4_e2m1fn"] == ["1.2.1", "1", "6", "1", "2^-1", "no", "no", "yes"]


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (2.0, "2"), (448.0, "448"), (0.5, "2^-1"), (2.0**127, "2^127"), (15.5, "15.5")]
)
def test_numbers_print_as_powers_of_two_only_where_they_are(value: float, text: str) -> None:
    assert _number(value) == text


def test_recipes_prints_three_rows_for_each_recipe() -> None:
    text = octavo("recipes").stdout
    for name, make in NAMED.items():
        assert make().describe() in text
        assert octavo("recipes", name).stdout == make().describe() + "\n"
    for gemm in ("output", "grad_input", "grad_weight"):
        assert len(re.findall(rf"^  {gemm} ", text, re.MULTILINE)) == len(NAMED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compar"], "No such command 'compar'. Did you mean 'compare'"),
        (["compare", "--epoch", "3"], "No such option: --epoch (Possible options: --epochs)"),
        (["compare", "--steps", "many"], "Invalid value for '--steps'"),
        (["compare", "--steps", "0"], "Invalid value for '--steps'"),
        (["compare", "--arms", "torch-fp32,torch-fp9"], "unknown arm 'torch-fp9'; did you mean 'torch-fp8'?"),
        (["compare", "--data", "mnst"], "unknown data set 'mnst'; did you mean 'mnist'?"),
        (["compare", "--model", "cnm"], "unknown model 'cnm'; did you mean 'cnn'?"),
        (["compare", "--model", "%%%"], "unknown model '%%%'; choose from cnn, mlp, fc"),
        (["formats", "float8_e4m3f"], "unknown format 'float8_e4m3f'; did you mean 'float8_e4m3fn'?"),
        (["recipes", "delayed"], "unknown recipe 'delayed'; did you mean 'delayed_scaling'?"),
        (["formats", "float8_e5m2", "extra"], "extra"),
    ],
)
def test_a_name_that_there_is_not_is_one_line_with_the_nearest(arguments: list[str], message: str, here: Here) -> None:
    assert message in complaint(here(*arguments), 2)


def test_an_error_in_a_real_process_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    message = complaint(octavo("compare", "--arms", "torch-fp9", cwd=tmp_path), 2)
    assert message == "octavo: unknown arm 'torch-fp9'; did you mean 'torch-fp8'?"


def test_an_unwritable_folder_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = octavo("compare", "--data", "digits", "--out", str(tmp_path / "file" / "runs"))
    assert re.search(r"cannot write to --out .*: Not a directory; choose another folder", complaint(done, 1))
    assert done.stdout == ""


def test_broken_data_is_one_line_that_names_the_file(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03"))
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path))
    assert str(tmp_path) in complaint(here("compare", "--data", "mnist", "--out", "out"), 1)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "2000"], "batch_size 2000 exceeds the 1437 training samples"),
        (["--lr", "nan"], "lr must be a positive finite number"),
        (["--arms", ","], "arms must name at least one arm"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(arguments: list[str], message: str, here: Here) -> None:
    assert message in complaint(here("compare", "--data", "digits", *arguments), 1)


def test_a_run_that_diverges_is_one_line_and_leaves_no_results(tmp_path: Path) -> None:
    done = octavo("compare", "--data", "digits", "--out", str(tmp_path), "--lr", "1e30")
    assert re.search(r"torch-fp32: training stopped at step \d+: .* holds (NaN|Inf)", complaint(done, 1))
    assert list(tmp_path.iterdir()) == []


def test_compare_prints_one_table_and_writes_what_it_says(tmp_path: Path) -> None:
    done = octavo("compare", "--data", "digits", "--steps", "12", "--out", "runs/new", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("arm "))
    table = [line.split() for line in lines[start + 2 : start + 7]]
    names = ["torch-fp32", "torch-bf16", "torch-fp8", "torch-fp8-current", "torch-fp8-infer"]
    assert [row[0] for row in table] == names
    assert table[0][-1] == "1.00"
    folder = tmp_path / "runs" / "new"
    results = json.loads((folder / "results.json").read_text())
    for row, arm in zip(table, results["arms"], strict=True):
        assert row[:3] == [arm["name"], f"{arm['final_loss']:.4f}", f"{arm['test_accuracy']:.2%}"]
    expected = {"results.json", "curves.png", "report.html", *(f"{name}.safetensors" for name in names)}
    assert {path.name for path in folder.iterdir()} == expected
    for text in ((folder / "results.json").read_text(), (folder / "report.html").read_text()):
        assert str(tmp_path) not in text


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job that a shell put in the background would ignore it
from octavo.lab import checkpoint
save = checkpoint.save

def save_and_wait(path, *arguments, **options):
    save(path, *arguments, **options)
    if path.name == "torch-bf16.safetensors":
        print("second arm saved", flush=True)
        while True:
            pass

checkpoint.save = save_and_wait
sys.argv = ["octavo", "compare", "--data", "digits", "--epochs", "2", "--out", sys.argv[1]]
from octavo.cli import main
main()
"""


def test_ctrl_c_keeps_the_results_and_checkpoints_so_far(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    try:
        assert any("second arm saved" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert errors == f"octavo: stopped; results so far are in {tmp_path}\n"
    results = json.loads((tmp_path / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["torch-fp32"]
    for arm, epoch in (("torch-fp32", 2), ("torch-bf16", 1)):
        state, header = checkpoint.load(tmp_path / f"{arm}.safetensors")
        assert (header["arm"], header["epoch"]) == (arm, epoch)
        assert state["fc1.weight"].isfinite().all()
    assert not list(tmp_path.glob(".*"))
