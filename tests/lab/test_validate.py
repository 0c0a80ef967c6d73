"""`validate`: the table a person reads, its totals and its exempt list, of models that are never built."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import octavo.torch as ot
from octavo.diagnose.chips import CHIPS, Arithmetic
from octavo.diagnose.kernels import Runs
from octavo.lab.models import ModelName, build
from octavo.lab.transformer import Transformer
from octavo.lab.validate import Scope, Validation, precision_of, validate
from octavo.patterns import chosen
from octavo.recipes import NAMED, Recipe, current_scaling, delayed_scaling, get_recipe

CONFIGS = Path(__file__).parents[2] / "examples" / "fc_mnist" / "configs"
COMMANDS = {
    "cnn": ("empty.yaml", ["model.name=cnn"]),
    "fc-mnist 10 x 50": (str(CONFIGS / "params.yaml"), []),
    "transformer of a billion": (str(CONFIGS / "transformer_1b.yaml"), []),
    **{name: ("empty.yaml", [f"model.activation_fn={name}", "model.dropout=0.1"]) for name in ("silu", "tanh", "elu")},
    "sigmoid": ("empty.yaml", ["model.activation_fn=sigmoid", "model.disable_softmax=true"]),
    "gelu": ("empty.yaml", ["model.activation_fn=gelu", "precision=mxfp8"]),
}
"""What `octavo validate` is asked, by a name: the file and the settings."""


def billion() -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return Transformer(32000, 2048, 24, 16, 8192), torch.empty(1, 2048, dtype=torch.long)


def cnn() -> tuple[nn.Module, Tensor]:
    return build(ModelName.CNN, seed=0).to("meta"), torch.empty(64, 1, 28, 28, device="meta")


def fc() -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        hidden = (nn.Linear(50, 50) for _ in range(9))
        return nn.Sequential(nn.Linear(784, 50), *hidden, nn.Linear(50, 10)), torch.empty(128, 784)


def mixed() -> tuple[nn.Module, Tensor]:
    """Two wide layers that gain and three narrow ones that do not."""
    with torch.device("meta"):
        wide = nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(2)))
        narrow = nn.Sequential(nn.Linear(8192, 4), nn.Linear(4, 8192), nn.Linear(8192, 4))
        return nn.Sequential(wide, narrow), torch.empty(8192, 8192)


def cells(found: Validation) -> list[list[str]]:
    """The table's lines, cut at two blanks and more."""
    lines = found.text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    table = [line for line in lines[first : lines.index("", first)] if not re.match(r"  \d+: ", line)]
    return [re.split(r"  +", line) for line in table]


def test_the_table_of_the_cnn() -> None:
    model, x = cnn()
    found = validate(model, [x], "delayed_scaling", target="sm90")
    head, *lines = cells(found)
    assert head == [
        "layer",
        "GEMM",
        "MxKxN",
        "kernel",
        "pad",
        "FP8?",
        "FLOP/B",
        "BF16 us",
        "recipe us",
        "ratio",
        "note",
    ]
    assert [(line[0], line[1], line[2]) for line in lines] == [
        ("conv1", "output", "43264x9x32"),
        ("conv1", "grad_weight", "32x43264x9"),
        ("conv2", "output", "36864x288x64"),
        ("conv2", "grad_input", "36864x64x288"),
        ("conv2", "grad_weight", "64x36864x288"),
        ("fc1", "output", "64x9216x128"),
        ("fc1", "grad_input", "64x128x9216"),
        ("fc1", "grad_weight", "128x64x9216"),
        ("fc2", "output", "64x128x16"),
        ("fc2", "grad_input", "64x16x128"),
        ("fc2", "grad_weight", "16x64x128"),
        ("fc3", "output", "64x16x10"),
        ("fc3", "grad_input", "64x10x16"),
        ("fc3", "grad_weight", "10x64x16"),
    ]
    assert [line[4] for line in lines[-3:]] == ["N+6", "K+6", "-"]
    assert [line[5] for line in lines] == ["could"] * 5 + ["yes"] * 9
    assert lines[-1][7:10] == ["3.0", "9.0", "0.33"]
    assert lines[0][-1] == "1"
    assert "\n  1: only products of two plain matrices" in found.text()


def test_columns_line_up() -> None:
    model, x = billion()
    lines = validate(model, [x], "delayed_scaling").text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    table = lines[first : first + 20]
    ratio = lines[first].index("ratio") + len("ratio")
    assert all(re.match(r"\d+\.\d\d(  |$)", line[ratio - 4 :]) for line in table[1:])
    gemm = lines[first].index("GEMM")
    assert {line[gemm - 2 : gemm] for line in table} == {"  "}
    assert all(line == line.rstrip() for line in lines)


def test_layers_that_are_alike_stand_in_one_row() -> None:
    model, x = billion()
    lines = cells(validate(model, [x], "delayed_scaling"))[1:]
    names = [line[0] for line in lines]
    assert names[::3] == [f"blocks.*.{word} x24" for word in ("qkv", "scores()", "context()", "out", "fc1", "fc2")] + [
        "head"
    ]
    by_name = {(line[0], line[1]): line[2] for line in lines}
    assert by_name["blocks.*.fc1 x24", "grad_weight"] == "8192x2048x2048"
    assert by_name["blocks.*.scores() x24", "output"] == "16 of 2048x128x2048"
    assert by_name["head", "output"] == "2048x2048x32000"


def test_nothing_of_a_billion_parameters_is_built() -> None:
    model, x = billion()
    found = validate(model, [x], "mxfp8", target="sm100")
    assert found.parameters > 1_000_000_000
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(found.rows) == 3 * (24 * 6 + 1)
    assert "1,343,868,928 parameters" in found.text()
    assert found.totals["recipe"].seconds == pytest.approx(math.fsum(row.recipe.seconds for row in found.rows))


@pytest.mark.parametrize("recipe", [*NAMED, "fp32"])
@pytest.mark.parametrize("target", CHIPS)
def test_every_recipe_on_every_target(recipe: str, target: str) -> None:
    model, x = fc()
    found = validate(model, [x], recipe, target=target)
    assert found.recipe == recipe
    assert found.text().startswith(f"{recipe} on {target}, ")
    assert len(json.loads(found.to_json())["gemms"]) == len(found.rows) == 3 * 11 - 1


def test_the_exempt_list_is_ready_to_use() -> None:
    model, x = mixed()
    found = validate(model, [x], current_scaling(), target="sm90")
    assert found.better == ("1.0", "1.1", "1.2")
    patterns, functions = found.exemptions()
    assert (patterns, functions) == (("1.*",), ())
    assert 'exempt: ["1.*"]' in found.text()
    assert chosen(dict(model.named_modules()), patterns, "exempt", inside=True) == {"1.0", "1.1", "1.2"}
    again = validate(model, [x], current_scaling(), target="sm90", exempt=patterns)
    assert again.better == ()
    assert again.exemptions() == (("1.*",), ())
    assert {row.reason for row in again.rows if row.layer.startswith("1.")} == {"exempt"}
    slower = re.search(r"slower layers in BF16 +([\d,.]+)", found.text())
    whole = re.search(r"\n  current_scaling +([\d,.]+)", again.text())
    assert slower is not None
    assert whole is not None
    assert slower[1] == whole[1]


def test_an_exempt_list_names_no_module_that_gains() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8192, 4), nn.Linear(4, 8192), nn.Linear(8192, 8192), nn.Linear(8192, 4))
        x = torch.empty(8192, 8192)
    found = validate(model, [x], current_scaling())
    assert found.better == ("0", "1", "3")
    assert found.exemptions()[0] == ("0", "1", "3")


def test_exempt_names_fit_the_model_that_is_converted() -> None:
    model = build(ModelName.CNN, seed=0)
    found = validate(
        build(ModelName.CNN, seed=0).to("meta"),
        [torch.empty(64, 1, 28, 28, device="meta")],
        "delayed_scaling",
        scope=Scope.LINEAR,
    )
    patterns, _ = found.exemptions()
    assert patterns == ("fc*",)
    ot.convert(model, delayed_scaling(), exempt=patterns)
    assert not any(isinstance(module, ot.Linear) for module in model.modules())
    convs = [row for row in found.rows if row.layer.startswith("conv")]
    assert {(row.runs, row.kernel, row.reason) for row in convs} == {
        (Runs.HIGH, "BF16", "only linear layers are converted")
    }


def test_functions_cannot_be_exempt_alone() -> None:
    model, x = billion()
    found = validate(model, [x], "delayed_scaling")
    assert found.exemptions()[0] == ()
    assert len(found.exemptions()[1]) == 48
    last = found.text().splitlines()[-2:]
    assert last[0] == "exempt: []"
    assert last[1].endswith("functions that modules call: blocks.*.scores() x24, blocks.*.context() x24")


def test_a_module_whose_every_product_is_slower_is_exempt_whole() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), torch.empty(2, 5, 8)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.inner[0](x, x, x, need_weights=False)[0]
            return mixed

    assert validate(Around(), [x], "current_scaling").exemptions() == (("inner.0",), ())


def test_blocks_whose_every_product_is_slower_are_exempt_by_one_pattern() -> None:
    model, x = billion()
    found = validate(model, [x], "current_scaling", target="sm80")
    assert found.exemptions() == (("blocks.*", "head"), ())
    assert validate(model, [x], "current_scaling", target="sm80", exempt=["blocks.*", "head"]).better == ()


def test_emulation_says_that_it_costs_time() -> None:
    model, x = cnn()
    text = validate(model, [x], "delayed_scaling", target="cpu").text()
    assert "# nothing here runs in 8 bits on cpu" in text
    assert "of their FLOP 0% could run in 8 bits or fewer there, 0% do in Octavo" in text
    assert "nothing here runs" not in validate(model, [x], "delayed_scaling", target="sm90").text()


def test_json_is_the_table() -> None:
    model, x = cnn()
    found = validate(model, [x], "delayed_scaling", target="sm90")
    spelled = json.loads(found.to_json())
    assert (spelled["target"], spelled["recipe"], spelled["parameters"]) == (
        "sm90",
        "delayed_scaling",
        found.parameters,
    )
    for row, one in zip(found.rows, spelled["gemms"], strict=True):
        assert (one["layer"], one["gemm"], one["kernel"], one["runs"]) == (
            row.layer,
            row.which.value,
            row.kernel,
            row.runs.value,
        )
        assert tuple(one["shape"].values()) == row.shape
        assert one["bf16"]["seconds"] == row.bf16.seconds
        assert one["ratio"] == row.ratio
    assert spelled["totals"]["recipe"]["seconds"] == pytest.approx(
        sum(one["recipe"]["seconds"] for one in spelled["gemms"])
    )
    assert spelled["exempt"] == ["conv*", "fc*"]


@pytest.mark.parametrize(("name", "arithmetic"), [("fp32", "FP32"), ("bf16", "BF16"), ("fp16", "FP16")])
def test_precisions_cast_nothing(name: str, arithmetic: str) -> None:
    assert precision_of(name) == (None, Arithmetic[arithmetic])
    model, x = cnn()
    found = validate(model, [x], name, target="sm90")
    assert {row.kernel for row in found.rows} == {arithmetic}
    assert {row.runs for row in found.rows} == {Runs.HIGH}
    assert found.text().endswith("exempt: []")


def test_other_precisions_are_recipes() -> None:
    assert precision_of("mxfp8") == (get_recipe("mxfp8"), Arithmetic.BF16)
    with pytest.raises(
        ValueError, match=r"precision is fp32, bf16, fp16 or a recipe .* got 'fp23'; did you mean 'fp32'"
    ):
        precision_of("fp23")


def test_a_recipe_of_ones_own() -> None:
    model, x = cnn()
    assert validate(model, [x], Recipe(name="mine")).text().startswith("mine on sm90")


def test_bad_input_is_refused() -> None:
    model, x = cnn()
    with pytest.raises(ValueError, match="target is one of"):
        validate(model, [x], "delayed_scaling", target="sm91")
    with pytest.raises(ValueError, match="exempt 'fc9' fits no module of the model; did you mean 'fc3'"):
        validate(model, [x], "delayed_scaling", exempt=["fc9"])
    with pytest.raises(ValueError, match=r"on the meta device; conv1\.weight is on cpu"):
        validate(build(ModelName.CNN, seed=0), [x], "delayed_scaling")


def test_a_transformer_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="num_heads divides hidden_size; got 3 and 16"):
        Transformer(10, 16, 1, 3, 32)
    with pytest.raises(ValueError, match="at most max_length=4 long; got 5"):
        Transformer(10, 16, 1, 2, 32, 4)(torch.zeros(1, 5, dtype=torch.long))


def test_a_transformer_sees_only_what_came_before() -> None:
    torch.manual_seed(0)
    model, tokens = Transformer(20, 16, 2, 4, 32, 8, tied=True), torch.randint(20, (2, 8))
    assert model.head.weight is model.tokens.weight
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 20
    one, other = model(tokens), model(changed)
    assert one.shape == (2, 8, 20)
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.equal(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_loads_no_compiler(name: str, tmp_path: Path) -> None:
    config, settings = COMMANDS[name]
    (tmp_path / "empty.yaml").write_text("precision: delayed_scaling\n")
    script = (
        "import gc, sys\n"
        "from octavo.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'torch.fx.experimental.symbolic_shapes', 'sympy', 'triton', 'numba'}\n"
        "print(code, gc.isenabled(), sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    arguments = ["validate", config, *(part for setting in settings for part in ("--set", setting)), "--json"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stderr == "0 True []\n"
    assert json.loads(done.stdout)["gemms"]


def test_output_that_nobody_reads_ends_the_command_with_a_code() -> None:
    command = [sys.executable, "-m", "octavo.cli", "validate", str(CONFIGS / "params.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
