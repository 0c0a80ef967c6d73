"""What the engine refuses, and that it says which operator and argument, what came, and what to do."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo import engine
from octavo.engine import ops
from octavo.engine.kernels.launch import Recorder, recorder
from octavo.engine.storage import Storage
from octavo.engine.tensor import operators

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Tests set PyTorch's number of threads, which is also the engine's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library() -> Iterator[engine.Library]:
    """A library whose operators are gone afterwards."""
    yield engine.Library("mine")
    for name in [name for name in operators if name.startswith("mine::")]:
        del operators[name]


def ones(*shape: int, dtype: Any = np.float32) -> engine.Tensor:
    return engine.full(shape, 1, dtype)


def tracked(*shape: int) -> engine.Tensor:
    return engine.from_numpy(np.ones(shape, np.float32), requires_grad=True)


def labels(*values: int) -> engine.Tensor:
    return engine.from_numpy(np.array(values, np.int64))


def on_cuda(*shape: int) -> engine.Tensor:
    """A tensor that says it is on a GPU; its memory is never looked at."""
    return engine.Tensor(Storage(engine.Device.CUDA, 4096, 4, None), shape, (1,) * len(shape), np.dtype(np.float32))


def says(text: str) -> str:
    """A pattern in which each ' .. ' stands for anything."""
    return ".*".join(re.escape(part) for part in text.split(" .. "))


def read_only() -> Array:
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    return array


TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: engine.from_numpy([1.0]), "from_numpy takes a NumPy array; got list: wrap it in numpy.asarray"),  # type: ignore[arg-type]
    "complex numbers": (
        lambda: engine.from_numpy(np.ones(2, np.complex64)),
        "a tensor holds float32, float64, .. got complex64: convert it first (.astype)",
    ),
    "the other byte order": (lambda: engine.from_numpy(np.ones(2, ">f4")), "got >f4: convert it first"),
    "objects": (lambda: engine.empty((2,), object), "got object: convert it first"),
    "read-only memory": (lambda: engine.from_numpy(read_only()), "this array is read-only .. hand over array.copy()"),
    "half an element": (
        lambda: engine.from_numpy(np.zeros(2, [("a", "f4"), ("b", "i2")])["a"]),
        "strides (6,) are no whole elements of float32; hand over array.copy()",
    ),
    "gradients of counts": (
        lambda: engine.from_numpy(np.arange(3), requires_grad=True),
        "gradients are of floating-point tensors; got int64: convert it first (.astype)",
    ),
    "no DLPack": (
        lambda: engine.from_dlpack([1.0]),
        "from_dlpack takes an array that speaks DLPack; got list: use from_numpy",
    ),
    "a negative size": (lambda: engine.zeros((2, -1)), "sizes of a tensor are 0 or more; got shape [2, -1]"),
    "an unknown device": (lambda: ones(1).to("gpu"), "a device is cpu or cuda; got 'gpu'"),
    "several numbers as one": (
        lambda: ones(2, 1).item(),
        "item() is of a tensor with one element; this one has shape [2, 1]",
    ),
    "no number as one": (lambda: bool(ones(0)), "one element; this one has shape [0]"),
    "a GPU's memory": (
        lambda: on_cuda(1).array,
        "this tensor is on cuda, where NumPy cannot look; copy it with .numpy()",
    ),
}

SHAPES: dict[str, tuple[Callable[[], Any], str]] = {
    "add": (lambda: ones(2, 3) + ones(2), "octavo::add: shapes [2, 3] and [2] do not broadcast; reshape one of them"),
    "divide": (lambda: ones(2) / ones(3), "octavo::divide: shapes [2] and [3] do not broadcast"),
    "matmul": (
        lambda: ones(2, 3) @ ones(2, 3),
        "octavo::matmul multiplies [.., M, K] by [.., K, N]; got [2, 3] and [2, 3]",
    ),
    "matmul of vectors": (lambda: ones(3) @ ones(3), "got [3] and [3]"),
    "matmul in batches": (
        lambda: ones(2, 4, 3) @ ones(5, 3, 1),
        "octavo::matmul: the leading dimensions of [2, 4, 3] and [5, 3, 1] do not broadcast; reshape one of them",
    ),
    "masked_matmul": (
        lambda: engine.masked_matmul(ones(2, 3), ones(3, 4), ones(4, 2)),
        "octavo::masked_matmul keeps [M, K] @ [K, N] where a mask [M, N] is positive; got [2, 3], [3, 4] and [4, 2]",
    ),
    "add_matmul_": (
        lambda: engine.add_matmul_(ones(2, 2), ones(2, 3), ones(3, 4)),
        "octavo::add_matmul_ adds [M, K] @ [K, N] to [M, N]; got [2, 3], [3, 4] and [2, 2]",
    ),
    "linear": (
        lambda: engine.linear(ones(2, 3), ones(4, 3)),
        "octavo::linear multiplies [.., I] by [I, O]; got [2, 3] and [4, 3]",
    ),
    "linear of a vector": (lambda: engine.linear(ones(3), ones(3, 4)), "got [3] and [3, 4]"),
    "a bias": (
        lambda: engine.linear_relu(ones(2, 3), ones(3, 4), ones(3)),
        "octavo::linear adds a contiguous bias [4] of float32; got [3] of float32",
    ),
    "relu_gradient": (
        lambda: ops.relu_gradient(ones(2), ones(3)),
        "octavo::relu_gradient takes two tensors of one shape; got [2] and [3]",
    ),
    "sum": (lambda: ones(2, 3).sum(2), "octavo::sum: a tensor of shape [2, 3] has no dimension 2"),
    "softmax": (
        lambda: engine.softmax(ones()),
        "octavo::softmax is along the last dimension; a tensor of shape [] has none",
    ),
    "log_softmax": (
        lambda: engine.log_softmax(ones(2, 0)),
        "octavo::log_softmax is along the last dimension; a tensor of shape [2, 0]",
    ),
    "argmax": (
        lambda: engine.argmax(ones(2, 0)),
        "octavo::argmax is along the last dimension; a tensor of shape [2, 0]",
    ),
    "cross_entropy": (
        lambda: engine.cross_entropy(ones(2, 3), labels(0, 1, 2)),
        "octavo::cross_entropy takes logits [N, classes] and labels [N]; got [2, 3] and [3]",
    ),
    "cross_entropy of nothing": (
        lambda: engine.cross_entropy_both(ones(0, 3), labels()),
        "octavo::cross_entropy_both takes .. got [0, 3] and [0]",
    ),
    "upstream": (
        lambda: ops.cross_entropy_gradient(ones(2, 3), labels(0, 1), ones(2)),
        "octavo::cross_entropy_gradient: upstream is one float32; got float32 [2]: give one number",
    ),
    "permute": (lambda: ones(2, 3).permute(0, 0), "octavo::permute takes each of 2 dimensions once; got (0, 0)"),
    "reshape": (lambda: ones(2, 3).reshape(4, -1), "octavo::reshape: 6 elements of shape [2, 3] do not fill [4, -1]"),
    "index": (lambda: ones(2, 3)[5], "octavo::index: shape [2, 3]: index 5 is out of bounds for axis 0 with size 2"),
    "too many indices": (lambda: ones(2, 3)[0, 0, 0], "octavo::index: shape [2, 3]: too many indices"),
    "an index of rows": (
        lambda: ones(2, 3)[[0, 1]],
        "octavo::index takes integers, slices, None and ...; for rows by number use engine.take_rows(x, rows)",
    ),
    "an index of truth": (lambda: ones(2, 3)[True], "octavo::index takes integers, slices, None and ..."),
    "take_rows": (
        lambda: engine.take_rows(ones(2, 3), labels(0, 1).reshape(2, 1)),
        "octavo::take_rows takes [rows, ..] and contiguous int64 [N]; got [2, 3] and int64 [2, 1]",
    ),
    "copy_": (
        lambda: engine.copy_(ones(2, 3), ones(3, 2)),
        "octavo::copy_ takes two tensors of one shape; got [2, 3] and [3, 2]",
    ),
    "sgd_": (
        lambda: engine.sgd_(ones(2, 3), ones(3, 2), None, 0.1),
        "octavo::sgd_ takes contiguous float32 tensors of one shape; got float32 [3, 2] beside [2, 3]; convert them first",
    ),
    "adam_": (
        lambda: engine.adam_(ones(2), ones(2), ones(3), ones(2), ones(1), 0.1),
        "octavo::adam_ takes contiguous float32 tensors of one shape; got float32 [3] beside [2]",
    ),
    "steps": (
        lambda: engine.adam_(ones(2), ones(2), ones(2), ones(2), ones(2), 0.1),
        "octavo::adam_: steps is one float32 number; got float32 [2]",
    ),
    "a rate": (
        lambda: engine.sgd_(ones(2), ones(2), None, ones(2)),
        "rate is a number, or a tensor of one float32 on cpu; got float32 [2] on cpu",
    ),
}

DTYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "softmax": (
        lambda: engine.softmax(ones(2, dtype=np.int64)),
        "octavo::softmax takes floating-point scores; got int64: convert them",
    ),
    "log_softmax": (
        lambda: engine.log_softmax(ones(2, dtype=np.bool_)),
        "octavo::log_softmax takes floating-point scores; got bool",
    ),
    "logits": (
        lambda: engine.cross_entropy(ones(2, 3, dtype=np.int32), labels(0, 1)),
        "octavo::cross_entropy takes floating-point scores; got int32: convert them with .astype(numpy.float32)",
    ),
    "labels": (
        lambda: engine.cross_entropy(ones(2, 3), ones(2, dtype=np.int32)),
        "octavo::cross_entropy: labels are contiguous int64; got int32: convert them with numpy.ascontiguousarray(labels, numpy.int64)",
    ),
    "labels with gaps": (
        lambda: engine.cross_entropy(ones(2, 3), labels(0, 9, 1, 9)[::2]),
        "octavo::cross_entropy: labels are contiguous int64; got int64 with gaps: convert them with numpy.ascontiguousarray",
    ),
    "upstream": (
        lambda: ops.cross_entropy_gradient(ones(2, 3), labels(0, 1), ones(dtype=np.float64)),
        "octavo::cross_entropy_gradient: upstream is one float32; got float64 []",
    ),
    "take_rows": (
        lambda: engine.take_rows(ones(2, 3), ones(2)),
        "octavo::take_rows takes .. int64 [N]; got [2, 3] and float32 [2]",
    ),
    "a bias": (
        lambda: engine.linear(ones(2, 3), ones(3, 4), ones(4, dtype=np.float64)),
        "octavo::linear adds a contiguous bias [4] of float32; got [4] of float64",
    ),
    "copy_": (
        lambda: engine.copy_(ones(2, dtype=np.int64), ones(2)),
        "octavo::copy_ does not turn float32 into int64; convert source first",
    ),
    "sgd_": (
        lambda: engine.sgd_(ones(2), ones(2, dtype=np.float64), None, 0.1),
        "octavo::sgd_ takes contiguous float32 .. got float64 [2]",
    ),
    "a rate": (
        lambda: engine.adam_(ones(2), ones(2), ones(2), ones(2), ones(1), ones(1, dtype=np.float64)),
        "rate is a number, or a tensor of one float32 on cpu; got float64 [1] on cpu: convert it first",
    ),
    "momentum without velocity": (
        lambda: engine.sgd_(ones(2), ones(2), None, 0.1, momentum=0.9),
        "octavo::sgd_ keeps its momentum in velocity: give both, or neither",
    ),
    "velocity without momentum": (
        lambda: engine.sgd_(ones(2), ones(2), ones(2), 0.1),
        "octavo::sgd_ keeps its momentum in velocity",
    ),
    "Nesterov without momentum": (
        lambda: engine.sgd_(ones(2), ones(2), None, 0.1, nesterov=True),
        "octavo::sgd_: nesterov=True looks ahead along the momentum; give momentum and velocity too",
    ),
}

DEVICES: dict[str, tuple[Callable[[], Any], str]] = {
    "add": (
        lambda: ones(1) + on_cuda(1),
        "octavo::add: right is on cuda and the tensors before it on cpu; move one with .to(...)",
    ),
    "linear": (
        lambda: engine.linear(ones(1, 1), ones(1, 1), on_cuda(1)),
        "octavo::linear: bias is on cuda and the tensors before it on cpu",
    ),
    "sgd_": (
        lambda: engine.sgd_(on_cuda(1), ones(1), None, 0.1),
        "octavo::sgd_: gradient is on cpu and the tensors before it on cuda",
    ),
    "a rate": (
        lambda: engine.sgd_(ones(1), ones(1), None, on_cuda(1)),
        "rate is a number, or a tensor of one float32 on cpu; got float32 [1] on cuda",
    ),
    "a gradient": (
        lambda: (tracked(1) * 2.0).backward(on_cuda(1)),
        "got float32 [1] on cuda, beside float32 [1] on cpu",
    ),
}


@pytest.mark.parametrize(("call", "text"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_is_not_made_of_anything(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=says(text)):
        call()


@pytest.mark.parametrize(("call", "text"), SHAPES.values(), ids=SHAPES)
def test_shapes_that_do_not_fit(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=says(text)):
        call()


@pytest.mark.parametrize(("call", "text"), DTYPES.values(), ids=DTYPES)
def test_dtypes_and_options_that_do_not_fit(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=says(text)):
        call()


@pytest.mark.parametrize(("call", "text"), DEVICES.values(), ids=DEVICES)
def test_devices_that_do_not_fit(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=says(text)):
        call()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda x: x.__name__)
@pytest.mark.parametrize(("place", "label"), [(0, 10), (700, -1), (999, 2**40)])
def test_labels_out_of_range(place: int, label: int, dtype: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    values = np.arange(1000) % 10
    values[place] = label
    logits, given = ones(1000, 10, dtype=dtype), engine.from_numpy(values)
    text = f"octavo::cross_entropy: label {place} is {label}, and 10 classes are 0 to 9; correct it"
    for operator in (engine.cross_entropy, engine.cross_entropy_both, ops.cross_entropy_gradient):
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(text)):
                operator(logits, given)
    values[place] = 0
    assert engine.cross_entropy(logits, given).item() == pytest.approx(np.log(10), rel=1e-6)


@pytest.mark.parametrize("number", [3, -1, 2**40])
@pytest.mark.parametrize("columns", [1, 5000])
def test_rows_out_of_range(number: int, columns: int) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"octavo::take_rows: number 1 is {number}, and x has 3 rows, from 0; correct it")
    ):
        engine.take_rows(ones(3, columns), labels(2, number, 0))
    with pytest.raises(ValueError, match="x has 0 rows"):
        engine.take_rows(ones(0, columns), labels(0, 0)[1:])


def test_arguments_are_counted_and_named() -> None:
    for call, text in (
        (lambda: engine.matmul(ones(1, 1)), "octavo::matmul(a, b): b is missing; 1 given in order"),
        (lambda: engine.relu(ones(1), ones(1)), "octavo::relu(x): that is too many; 2 given in order"),
        (
            lambda: engine.linear(ones(1, 1), weight=ones(1, 1), biass=None),
            "octavo::linear(input, weight, bias): biass is unknown",
        ),
        (lambda: engine.relu([1.0]), "octavo::relu: x is a Tensor; got list: wrap it with engine.from_numpy"),
        (lambda: engine.add(None, ones(1)), "octavo::add: left is a Tensor; got NoneType"),
    ):
        with pytest.raises(TypeError, match=re.escape(text)):
            call()


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("", "'' is no schema; write \"name(Tensor x, float by=1.0) -> Tensor\""),
        ("f(Tensor x)", "'f(Tensor x)' is no schema"),
        ("f Tensor x -> Tensor", "is no schema"),
        ("f(Tensor x) -> float", "is no schema"),
        ("f(Tensor x) -> (Tensor,", "is no schema"),
        ("other::f(Tensor x) -> Tensor", "is no schema"),
        (
            "f(tensor x) -> Tensor",
            "'tensor x' in 'f(tensor x) -> Tensor' is no argument; write a kind and a name, such as Tensor x",
        ),
        ("f(Tensor x,) -> Tensor", "'' in 'f(Tensor x,) -> Tensor' is no argument"),
        ("f(Tensor x y) -> Tensor", "'Tensor x y' in"),
        (
            "f(float by=fast) -> Tensor",
            "'fast' in 'f(float by=fast) -> Tensor' is no default; write a number, None, True or False",
        ),
        ("f(int by=1.5) -> Tensor", "'1.5' in 'f(int by=1.5) -> Tensor' is no default"),
        (
            "f(Tensor x, float x) -> Tensor",
            "two arguments of 'f(Tensor x, float x) -> Tensor' have one name; rename one",
        ),
    ],
)
def test_a_schema_that_does_not_parse(schema: str, text: str, library: engine.Library) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        library.define(schema)
    assert not any(name.startswith("mine::") for name in operators)


def test_nothing_is_registered_twice(library: engine.Library) -> None:
    made = library.define("f(Tensor x) -> Tensor")
    library.impl("f", lambda x: x)
    engine.register(made, lambda gradients, saved: gradients)
    with pytest.raises(ValueError, match="mine::f is defined already; choose another name"):
        library.define("f(Tensor y) -> ()")
    with pytest.raises(ValueError, match="mine::f has a kernel for cpu already; define an operator of your own"):
        library.impl("mine::f", lambda x: x, "cpu")
    with pytest.raises(ValueError, match="mine::f has a backward function already; define an operator of your own"):
        engine.register("mine::f", lambda gradients, saved: gradients)
    with pytest.raises(ValueError, match="octavo::relu is defined already"):
        engine.Library("octavo").define("relu(Tensor x) -> Tensor")


def test_names_that_are_not_there(library: engine.Library) -> None:
    with pytest.raises(
        ValueError, match=re.escape("there is no operator 'octavo::rleu'; did you mean 'octavo::relu'?")
    ):
        engine.operator("octavo::rleu")
    with pytest.raises(
        ValueError, match=r"there is no operator 'mine::quite_another_thing'; define it with Library[.]define"
    ):
        library.impl("quite_another_thing", lambda x: x)
    with pytest.raises(ValueError, match="a library's name is an identifier; got 'my ops'"):
        engine.Library("my ops")
    with pytest.raises(ValueError, match="a device is cpu or cuda; got 'tpu'"):
        library.impl("octavo::relu", lambda x: x, "tpu")


def test_an_operator_without_a_kernel(library: engine.Library) -> None:
    made = library.define("f(Tensor x) -> Tensor")
    with pytest.raises(
        ValueError,
        match=r"mine::f runs on no device, and was called on cpu; give it a kernel with Library\.impl, or move its tensors",
    ):
        made(ones(1))
    library.impl("f", lambda x: x * 1.0, "cpu")
    with pytest.raises(ValueError, match="mine::f runs on cpu, and was called on cuda"):
        made(on_cuda(1))


def test_an_operator_without_a_gradient(library: engine.Library) -> None:
    made = library.define("f(Tensor x, Tensor y) -> Tensor")
    calls: list[int] = []
    library.impl("f", lambda x, y: calls.append(1) or x * y)
    x, y = tracked(2), tracked(2)
    with pytest.raises(
        ValueError,
        match=r"mine::f has no gradient, and x and y requires one; register its backward function, or call it inside no_grad\(\)",
    ):
        made(x, y)
    with pytest.raises(ValueError, match="octavo::argmax has no gradient, and x requires one"):
        engine.argmax(x * 2.0)
    assert not calls
    with engine.no_grad():
        assert made(x, y).numpy().tolist() == [1, 1]
    assert made(x.detach(), y.detach()).node is None


Rule = Callable[[Any, Any], Any]
RULES: dict[str, tuple[Rule, str]] = {
    "too few": (
        lambda gradients, saved: [gradients[0]],
        "mine::f: its backward function returns 1, and 3 gradients are due, one for each argument",
    ),
    "too many": (
        lambda gradients, saved: [None] * 4,
        "mine::f: its backward function returns 4, and 3 gradients are due",
    ),
    "not a sequence": (
        lambda gradients, saved: gradients[0],
        "mine::f: its backward function returns Tensor, and 3 gradients are due",
    ),
    "another shape": (
        lambda gradients, saved: (gradients[0], gradients[0].sum(0), None),
        "mine::f: the gradient of y has shape [3], and y is a tensor of shape [2, 3]; correct its backward function",
    ),
    "an array": (
        lambda gradients, saved: (gradients[0].numpy(), None, None),
        "mine::f: the gradient of x is a ndarray, and x is a tensor of shape [2, 3]; correct its backward function",
    ),
}


@pytest.mark.parametrize(("rule", "text"), RULES.values(), ids=RULES)
def test_a_backward_function_that_returns_something_else(rule: Rule, text: str, library: engine.Library) -> None:
    made = library.define("f(Tensor x, Tensor y, float by=1) -> Tensor")
    library.impl("f", lambda x, y, by: x * y * by)
    engine.register(made, rule)
    out = made(tracked(2, 3), tracked(2, 3)).sum()
    with pytest.raises(ValueError, match=re.escape(text)):
        out.backward()


def test_a_kernel_that_returns_something_else(library: engine.Library) -> None:
    made = library.define("f(Tensor x) -> (Tensor, Tensor)")
    library.impl("f", lambda x: x * 2.0)
    engine.register(made, lambda gradients, saved: [None])
    with pytest.raises(ValueError, match="mine::f: its kernel returns 1 tensors, and its schema says 2; correct one"):
        made(tracked(2))
    same = library.define("same(Tensor x) -> Tensor")
    library.impl("same", lambda x: x)
    engine.register(same, lambda gradients, saved: gradients)
    with pytest.raises(ValueError, match=r"mine::same: its kernel returns one of its arguments.*return its detach\(\)"):
        same(tracked(2))


def changes(x: engine.Tensor) -> dict[str, Callable[[], Any]]:
    """Ways to change a tensor of shape [4, 4] in place."""
    return {
        "itself": lambda: engine.copy_(x, ones(4, 4)),
        "a row": lambda: engine.copy_(x[1], ones(4)),
        "a turned view": lambda: engine.add_matmul_(x.T, ones(4, 2), ones(2, 4)),
        "its detached view": lambda: engine.sgd_(x.detach(), ones(4, 4), None, 0.1),
    }


@pytest.mark.parametrize("way", ["itself", "a row", "a turned view", "its detached view"])
def test_a_saved_tensor_that_was_changed_in_place(way: str) -> None:
    x, weight = ones(4, 4), tracked(4, 4)
    loss = (x @ weight).sum()
    changes(x)[way]()
    with pytest.raises(
        RuntimeError,
        match=re.escape(
            "octavo::matmul: a was changed in place after it was saved for backward (version 0, now 1); change a copy, or call "
            "backward first"
        ),
    ):
        loss.backward()
    loss = (x @ weight).sum()
    with engine.no_grad():
        changes(weight)[way]()
    with pytest.raises(RuntimeError, match="octavo::matmul: b was changed in place after it was saved for backward"):
        loss.backward()
    weight.grad = None
    (x @ weight).sum().backward()
    assert weight.grad is not None


def test_a_saved_outcome_that_was_changed_in_place() -> None:
    x = tracked(2, 3)
    y = engine.softmax(x)
    with engine.no_grad():
        engine.copy_(y[0], ones(3))
    with pytest.raises(
        RuntimeError, match="octavo::softmax: its output was changed in place after it was saved for backward"
    ):
        y.backward(ones(2, 3))


def test_a_tensor_that_gradients_flow_through_is_not_changed(library: engine.Library) -> None:
    x = tracked(2)
    with pytest.raises(ValueError, match="octavo::sgd_ has no gradient, and weight requires one"):
        engine.sgd_(x, ones(2), None, 0.5)
    made = library.define("double_(Tensor! x) -> ()")
    library.impl("double_", lambda x: engine.copy_(x, x * 2.0))
    engine.register(made, lambda gradients, saved: [None])
    with pytest.raises(
        ValueError, match=r"mine::double_ would change x, which gradients flow through; use no_grad\(\)"
    ):
        made(x)
    assert x.numpy().tolist() == [1, 1]
    assert x.version == 0
    with engine.no_grad():
        made(x)
    assert x.numpy().tolist() == [2, 2]


def test_backward_twice() -> None:
    loss = (tracked(2) * 2.0).sum()
    loss.backward()
    with pytest.raises(
        RuntimeError,
        match="octavo::sum: its saved tensors are gone, because backward ran here before; give the first call retain=True",
    ):
        loss.backward()


def test_backward_from_where_nothing_leads_on() -> None:
    with pytest.raises(
        ValueError,
        match=r"nothing was recorded for this tensor: none of its inputs requires a gradient, or it was made inside no_grad\(\)",
    ):
        ones(1).backward()
    x = tracked(2)
    with pytest.raises(
        ValueError,
        match=re.escape("backward() without a gradient is for one number; this tensor has shape [2]: give gradient="),
    ):
        (x * 2.0).backward()
    for gradient, got in ((ones(3), "float32 [3]"), (ones(2, dtype=np.float64), "float64 [2]")):
        text = f"backward() takes a gradient like its tensor; got {got} on cpu, beside float32 [2] on cpu: give one of that shape and dtype"
        with pytest.raises(ValueError, match=re.escape(text)):
            (x * 2.0).backward(gradient)
    assert x.grad is None


def test_a_tensor_with_a_gradient_does_not_travel() -> None:
    with pytest.raises(
        BufferError, match=r"this tensor requires gradients, which do not travel; hand over its detach\(\)"
    ):
        torch.from_dlpack(tracked(2))
    assert torch.from_dlpack(tracked(2).detach()).tolist() == [1, 1]


REFUSED: dict[str, tuple[Callable[[engine.Tensor], Any], str]] = {
    "its values": (lambda x: x.numpy(), "a tensor's values are read"),
    "one number": (lambda x: x[0, 0].item(), "a tensor's values are read"),
    "float64": (lambda x: engine.full((2,), 1, np.float64), "a tensor of float64 is filled"),
    "a turned softmax": (lambda x: engine.softmax(x.T), "a tensor's elements are put in order"),
}


@pytest.mark.parametrize(("call", "text"), REFUSED.values(), ids=REFUSED)
def test_a_captured_step_refuses_what_no_compiled_kernel_does(call: Callable[[engine.Tensor], Any], text: str) -> None:
    x = engine.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
    token = recorder.set(Recorder())
    try:
        with pytest.raises(
            RuntimeError, match=f"{text} while a step is captured, before anything of it ran; do that outside the step"
        ):
            call(x)
    finally:
        recorder.reset(token)
