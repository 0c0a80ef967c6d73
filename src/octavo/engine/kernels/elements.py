"""Kernels over float32 numbers one by one: arithmetic, ReLU, fills, and the two rules that update weights."""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from octavo.engine.kernels.launch import Kernel, inner, lane_kernel
from octavo.kernels.memory import at, fma, wide_vectors

__all__ = ["adam", "arithmetic", "fill", "relu", "relu_gradient", "sgd"]

F32 = np.float32


@inner
def share(size, lane, lanes):
    """(first, how many) of the numbers that a lane takes: whole vectors, but for the last."""
    vectors = (size + 15) // 16
    first = vectors * lane // lanes * 16
    return first, min(size, vectors * (lane + 1) // lanes * 16) - first


@inner
def _floats(address, first, count):
    return carray(at(address + 4 * first), (count,), np.float32)


@inner
def _combine(a, b, out, operation):
    wide_vectors()
    if operation == 0:
        for i in range(out.size):
            out[i] = a[i] + b[i]
    elif operation == 1:
        for i in range(out.size):
            out[i] = a[i] - b[i]
    elif operation == 2:
        for i in range(out.size):
            out[i] = a[i] * b[i]
    else:
        for i in range(out.size):
            out[i] = a[i] / b[i]


@inner
def _combine_one(a, b, out, operation):
    """The same, b one number."""
    wide_vectors()
    if operation == 0:
        for i in range(out.size):
            out[i] = a[i] + b
    elif operation == 1:
        for i in range(out.size):
            out[i] = a[i] - b
    elif operation == 2:
        for i in range(out.size):
            out[i] = a[i] * b
    else:
        for i in range(out.size):
            out[i] = a[i] / b


@lane_kernel
def _arithmetic(address, lane, lanes):
    """a, b, out, size, operation (+, -, *, / from 0), whether b is one number."""
    a, b, out, size, operation, one = carray(at(address), (6,), np.int64)
    first, count = share(size, lane, lanes)
    if count <= 0:
        return
    left, into = _floats(a, first, count), _floats(out, first, count)
    if one:
        _combine_one(left, _floats(b, 0, 1)[0], into, operation)
    else:
        _combine(left, _floats(b, first, count), into, operation)


@lane_kernel
def _relu(address, lane, lanes):
    """x, out, size: NaN stays, -0 too."""
    wide_vectors()
    x, out, size = carray(at(address), (3,), np.int64)
    first, count = share(size, lane, lanes)
    if count > 0:
        source, into = _floats(x, first, count), _floats(out, first, count)
        for i in range(count):
            into[i] = F32(0) if source[i] < F32(0) else source[i]


@lane_kernel
def _relu_gradient(address, lane, lanes):
    """gradient, x, out, size: the gradient where x is positive, 0 elsewhere."""
    wide_vectors()
    gradient, x, out, size = carray(at(address), (4,), np.int64)
    first, count = share(size, lane, lanes)
    if count > 0:
        given, source, into = _floats(gradient, first, count), _floats(x, first, count), _floats(out, first, count)
        for i in range(count):
            into[i] = given[i] if source[i] > F32(0) else F32(0)


@lane_kernel
def _fill(address, lane, lanes):
    """out, size, a float64 that becomes float32."""
    out, size = carray(at(address), (2,), np.int64)
    value = F32(carray(at(address + 16), (1,), np.float64)[0])
    first, count = share(size, lane, lanes)
    if count > 0:
        into = _floats(out, first, count)
        for i in range(count):
            into[i] = value


@inner
def _rate(address):
    """The learning rate: a float64 here, or a float32 at the address after it."""
    value, place = carray(at(address), (1,), np.float64)[0], carray(at(address + 8), (1,), np.int64)[0]
    return F32(value) if place == 0 else carray(at(place), (1,), np.float32)[0]


@inner
def _sgd_plain(w, g, rate, decay):
    wide_vectors()
    for i in range(w.size):
        w[i] = fma(-rate, fma(decay, w[i], g[i]), w[i])  # rounded where PyTorch and XLA round


@inner
def _sgd_momentum(w, g, v, rate, momentum, decay, nesterov):
    wide_vectors()
    for i in range(w.size):
        step = fma(decay, w[i], g[i])
        v[i] = momentum * v[i] + step
        w[i] = fma(-rate, fma(momentum, v[i], step) if nesterov else v[i], w[i])


@lane_kernel
def _sgd(address, lane, lanes):
    """weight, gradient, velocity or 0, size, whether Nesterov's, rate, where else the rate is, momentum, weight decay."""
    weight, gradient, velocity, size, nesterov = carray(at(address), (5,), np.int64)
    momentum, decay = carray(at(address + 56), (2,), np.float64)
    first, count = share(size, lane, lanes)
    if count <= 0:
        return
    w, g, rate = _floats(weight, first, count), _floats(gradient, first, count), _rate(address + 40)
    if velocity:
        v = _floats(velocity, first, count)
        _sgd_momentum(w, g, v, rate, F32(momentum), F32(decay), nesterov != 0)
    else:
        _sgd_plain(w, g, rate, F32(decay))


@inner
def _adam_update(w, g, m, v, step, root, beta1, beta2, epsilon, decay):
    wide_vectors()
    one = F32(1)
    for i in range(w.size):
        grad = g[i] + decay * w[i]
        m[i] = beta1 * m[i] + (one - beta1) * grad
        v[i] = beta2 * v[i] + (one - beta2) * grad * grad
        w[i] -= step * m[i] / (np.sqrt(v[i]) / root + epsilon)


@lane_kernel
def _adam(address, lane, lanes):
    """weight, gradient, first and second moment, steps so far (float32, raised by lane 0 of `count`), size; rate, where else, beta1,
    beta2, epsilon, weight decay."""
    weight, gradient, first_moment, second_moment, steps, size = carray(at(address), (6,), np.int64)
    beta1, beta2, epsilon, decay = carray(at(address + 64), (4,), np.float64)
    first, count = share(size, lane, lanes)
    if count <= 0:
        return
    t = np.float64(_floats(steps, 0, 1)[0])
    rate = np.float64(_rate(address + 48)) / (1 - beta1**t)
    root = math.sqrt(1 - beta2**t)
    w, g = _floats(weight, first, count), _floats(gradient, first, count)
    m, v = _floats(first_moment, first, count), _floats(second_moment, first, count)
    _adam_update(w, g, m, v, F32(rate), F32(root), F32(beta1), F32(beta2), F32(epsilon), F32(decay))


arithmetic = Kernel("arithmetic", _arithmetic, "<6q")
relu = Kernel("relu", _relu, "<3q")
relu_gradient = Kernel("relu_gradient", _relu_gradient, "<4q")
fill = Kernel("fill", _fill, "<2qd")
sgd = Kernel("sgd", _sgd, "<5qdq2d")
adam = Kernel("adam", _adam, "<6qdq4d")
