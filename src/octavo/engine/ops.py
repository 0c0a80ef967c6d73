"""Octavo's own operators: what each computes, how its gradients follow, and which kernel runs it where.

Shapes: `[.., M, K]` is any number of leading dimensions.  Two tensors that meet follow NumPy's rules of broadcasting and dtypes.  NaN and
Inf go through all of them as IEEE 754 has it; what differs is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.engine.operators import Library, Operator, register
from octavo.engine.storage import Device
from octavo.engine.tensor import Tensor

__all__ = [
    "adam_",
    "add",
    "add_matmul_",
    "argmax",
    "copy_",
    "cross_entropy",
    "cross_entropy_both",
    "divide",
    "exp",
    "fold",
    "linear",
    "linear_relu",
    "log",
    "log_softmax",
    "masked_matmul",
    "matmul",
    "multiply",
    "patches",
    "relu",
    "sgd_",
    "softmax",
    "subtract",
    "sum_to",
    "take_rows",
    "take_runs",
    "unit",
]

_library = Library("octavo")
Grads = Sequence[Any]


def _define(schema: str) -> Operator:
    """The operator, with the kernels that each device has for it."""
    made = _library.define(schema)
    from octavo.engine.kernels import cpu

    name = made.name.removeprefix("octavo::")
    if name in cpu.KERNELS:
        _library.impl(name, cpu.KERNELS[name], Device.CPU)
    _library.impl(name, _on_cuda(name), Device.CUDA)
    return made


def _on_cuda(name: str) -> Any:
    """The Triton kernel, looked up when it is first called: Triton is loaded then."""

    def run(*arguments: Any) -> Any:
        from octavo.engine.kernels import cuda

        return cuda.kernel(name)(*arguments)

    return run


full = _define("full(object shape, float value, object dtype, object device) -> Tensor")
add = _define("add(Tensor left, Tensor right) -> Tensor")
"""left + right."""
subtract = _define("subtract(Tensor left, Tensor right) -> Tensor")
"""left - right."""
multiply = _define("multiply(Tensor left, Tensor right) -> Tensor")
"""left * right."""
divide = _define("divide(Tensor left, Tensor right) -> Tensor")
"""left / right."""
exp = _define("exp(Tensor x) -> Tensor")
"""e to the power of each number."""
log = _define("log(Tensor x) -> Tensor")
"""The natural logarithm."""
matmul = _define("matmul(Tensor a, Tensor b) -> Tensor")
"""[.., M, K] @ [.., K, N] -> [.., M, N].  float32 matrices are summed along K in order, fused, in pieces of 400."""
masked_matmul = _define("masked_matmul(Tensor a, Tensor b, Tensor mask) -> Tensor")
"""a @ b where mask, [M, N], is positive; 0 elsewhere: the gradient of a ReLU's input, in one kernel."""
add_matmul_ = _define("add_matmul_(Tensor! c, Tensor a, Tensor b, float alpha=1.0) -> ()")
"""c += alpha * (a @ b), in place: [M, K] @ [K, N] on top of [M, N]."""
linear = _define("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
"""[.., I] @ [I, O] + [O] -> [.., O]: weights lie inputs first."""
linear_relu = _define("linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
"""relu(linear(...)) in one kernel."""
relu = _define("relu(Tensor x) -> Tensor")
"""0 for negative numbers; NaN stays NaN."""
relu_gradient = _define("relu_gradient(Tensor gradient, Tensor x) -> Tensor")
"""gradient where x is positive, 0 elsewhere, also where x is NaN."""
sum = _define("sum(Tensor x, object axis=None) -> Tensor")
"""The sum of all, or along one dimension, which goes, in x's dtype."""
softmax = _define("softmax(Tensor x) -> Tensor")
"""Along the last dimension."""
log_softmax = _define("log_softmax(Tensor x) -> Tensor")
"""Along the last dimension."""
cross_entropy = _define("cross_entropy(Tensor logits, Tensor labels) -> Tensor")
"""The mean over N of -log softmax(logits)[n, labels[n]]: logits [N, classes], labels int64 [N]; ValueError for a label out of range."""
cross_entropy_gradient = _define(
    "cross_entropy_gradient(Tensor logits, Tensor labels, Tensor? upstream=None) -> Tensor"
)
cross_entropy_both = _define("cross_entropy_both(Tensor logits, Tensor labels) -> (Tensor, Tensor)")
"""cross_entropy, and its gradient by the logits, in one pass."""
argmax = _define("argmax(Tensor x) -> Tensor")
"""int64: where along the last dimension the largest number is, the first of equals, or the first NaN."""
permute = _define("permute(Tensor x, object axes) -> Tensor")
reshape = _define("reshape(Tensor x, object shape) -> Tensor")
index = _define("index(Tensor x, object key) -> Tensor")
take_rows = _define("take_rows(Tensor x, Tensor numbers) -> Tensor")
"""x[numbers]: rows of x [rows, ..] by number, int64 [N]; ValueError for one out of range."""
take_runs = _define("take_runs(Tensor x, Tensor starts, int length) -> Tensor")
"""[N, length]: so many float32 numbers from each start on, int64 [N], in x laid out in a row; images that are shifted a little.  ValueError
for a run that leaves x.  Has no gradient."""
patches = _define("patches(Tensor x, object window, int stride=1, int padding=0) -> Tensor")
"""[N, H, W, C] -> [N * down * across, rows * columns * C]: what a window of (rows, columns) pixels, or of one number for both, shows at
each of its places, zeros outside the image; down = (H + 2 * padding - rows) // stride + 1.  A convolution is linear(patches(x, ..), weight)
with weight [rows * columns * C, O]."""
fold = _define("fold(Tensor matrix, object shape, object window, int stride=1, int padding=0) -> Tensor")
"""The transpose of patches: images of that shape, [N, H, W, C], in which each pixel is the sum of what the matrix has for it."""
unit = _define("unit(Tensor x) -> Tensor")
"""x over the root of the sum of its squares, both in float64 before rounding; zeros stay zeros, Inf becomes NaN and makes the rest 0, NaN
makes all NaN.  Has no gradient: it is for the rules that update weights."""
copy_ = _define("copy_(Tensor! target, Tensor source) -> ()")
"""target = source, in place, of one shape."""
sgd_ = _define(
    "sgd_(Tensor! weight, Tensor gradient, Tensor!? velocity, object rate, float momentum=0, float decay=0, bool nesterov=False) -> ()"
)
"""weight -= rate * step, step = gradient + decay * weight; as torch.optim.SGD.  With momentum, velocity = momentum * velocity + step stands
for the step, and with nesterov step + momentum * velocity; rate: a number, or a tensor of one."""
adam_ = _define(
    "adam_(Tensor! weight, Tensor gradient, Tensor! first, Tensor! second, Tensor! steps, object rate, float beta1=0.9, "
    "float beta2=0.999, float epsilon=1e-8, float decay=0) -> ()"
)
"""Adam (Kingma and Ba 2015), as torch.optim.Adam; steps: one float32, 0 at first, raised here; rate: a number, or a tensor of one."""


def sum_to(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradient of a tensor of that shape from that of what it was broadcast to."""
    if gradient.shape == shape:
        return gradient
    while gradient.ndim > len(shape):
        gradient = gradient.sum(0)
    for axis, length in enumerate(shape):
        if length == 1 and gradient.shape[axis] != 1:
            kept = (*gradient.shape[:axis], 1, *gradient.shape[axis + 1 :])
            gradient = gradient.sum(axis).reshape(*kept)
    return gradient


def _turned(x: Tensor) -> Tensor:
    """The view with its last two dimensions exchanged."""
    return x.permute(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)


def _matmul_backward(grads: Grads, saved: Grads) -> Grads:
    (grad,), (a, b) = grads, saved
    return sum_to(matmul(grad, _turned(b)), a.shape), sum_to(matmul(_turned(a), grad), b.shape)


def _linear_backward(grads: Grads, saved: Grads) -> Grads:
    (grad,), (input, weight, bias) = grads, saved[:3]
    flat, rows = (x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) for x in (grad, input))
    tracked = input.requires_grad or input.node is not None
    grad_input = matmul(flat, weight.detach().T) if tracked else None
    if grad_input is not None and input.ndim != 2:
        grad_input = grad_input.reshape(*input.shape)
    return grad_input, matmul(rows.detach().T, flat), None if bias is None else flat.sum(0)


def _linear_relu_backward(grads: Grads, saved: Grads) -> Grads:
    return _linear_backward([relu_gradient(grads[0], saved[3])], saved)


def _softmax_backward(grads: Grads, saved: Grads) -> Grads:
    (grad,), (_, out) = grads, saved
    weighted = grad * out
    total = weighted.sum(-1).reshape(*out.shape[:-1], 1)
    return (weighted - out * total,)


def _log_softmax_backward(grads: Grads, saved: Grads) -> Grads:
    (grad,), (_, out) = grads, saved
    return (grad - exp(out) * grad.sum(-1).reshape(*out.shape[:-1], 1),)


def _sum_backward(grads: Grads, saved: Grads) -> Grads:
    (grad,), (x, axis) = grads, saved
    kept = (1,) * x.ndim if axis is None else tuple(1 if i == axis % x.ndim else n for i, n in enumerate(x.shape))
    return _spread(grad.reshape(*kept), x.shape), None


def _spread(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The view of x, broadcast to that shape."""
    strides = tuple(0 if have == 1 else stride for have, stride in zip(x.shape, x.strides, strict=True))
    return Tensor(x.storage, shape, strides, x.dtype, x.offset)


def _permute_backward(grads: Grads, saved: Grads) -> Grads:
    axes = saved[1]
    return grads[0].permute(*sorted(range(len(axes)), key=axes.__getitem__)), None


def _scatter(gradient: Tensor, x: Tensor, key: Any) -> Tensor:
    """Zeros of x's shape with the gradient at `key`."""
    from octavo.engine.tensor import zeros

    out = zeros(x.shape, gradient.dtype, device=gradient.device)
    copy_(index(out, key), gradient)
    return out


register(add, lambda grads, saved: [sum_to(grads[0], x.shape) for x in saved])
register(subtract, lambda grads, saved: [sum_to(grads[0], saved[0].shape), sum_to(-grads[0], saved[1].shape)])
register(multiply, lambda grads, saved: [sum_to(grads[0] * saved[1 - i], saved[i].shape) for i in (0, 1)])
register(
    divide,
    lambda grads, saved: [
        sum_to(grads[0] / saved[1], saved[0].shape),
        sum_to(-grads[0] * (saved[0] / saved[1] / saved[1]), saved[1].shape),
    ],
)
register(exp, lambda grads, saved: [grads[0] * saved[1]], saves_outputs=True)
register(log, lambda grads, saved: [grads[0] / saved[0]])
register(matmul, _matmul_backward)
register(linear, _linear_backward)
register(linear_relu, _linear_relu_backward, saves_outputs=True)
register(relu, lambda grads, saved: [relu_gradient(grads[0], saved[0])])
register(sum, _sum_backward)
register(softmax, _softmax_backward, saves_outputs=True)
register(log_softmax, _log_softmax_backward, saves_outputs=True)
register(cross_entropy, lambda grads, saved: [cross_entropy_gradient(*saved, grads[0]), None])
register(permute, _permute_backward)
register(reshape, lambda grads, saved: [grads[0].reshape(*saved[0].shape), None])
register(index, lambda grads, saved: [_scatter(grads[0], *saved), None])
register(patches, lambda grads, saved: [fold(grads[0], saved[0].shape, *saved[1:]), None, None, None])
register(fold, lambda grads, saved: [patches(grads[0], *saved[2:]), None, None, None, None])
