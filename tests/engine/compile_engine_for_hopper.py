"""Compile every kernel of the engine for Hopper, which needs no GPU, and look at the instructions: run by test_engine_cuda.py.

The operators run on CUDA tensors that lie in host memory, but what would be launched is only compiled.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from octavo import engine
from octavo.engine import Tensor, from_numpy
from octavo.engine.kernels import (
    cuda_casts,
    cuda_checks,
    cuda_element_kernels,
    cuda_gemm_kernels,
    cuda_launch,
    cuda_memory,
    cuda_mlp,
    cuda_mlp_kernels,
    cuda_products,
    cuda_row_kernels,
)
from octavo.formats import E4M3FN, E5M2
from octavo.rounding import Rounding

FORBIDDEN = re.compile(
    r"\b(?:(?:add|sub|mul|fma|div)\S*ftz\S*f32|mad\.\S*f32|div\.(?:full|approx)\S*f32|(?:rcp|ex2|lg2)\.\S*f32|\S*mma\S*|\S*tf32\S*)"
)
"""Instructions that flush subnormals, do not round to nearest, or multiply matrices in an order and a precision of their own."""
FUSED = re.compile(r"\bfma\.rn\.f32")
THREADS = 128


class Hopper:
    """What Triton asks of a driver before it launches."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": 132})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


compiled: dict[str, int] = {}


def compile_only(kernel: Any, grid: Any) -> Any:
    """What `kernel[grid]` is while this script runs."""

    def launch(*arguments: Any, **constants: Any) -> None:
        ptx, name = kernel.warmup(*arguments, grid=grid, **constants).asm["ptx"], kernel.__name__
        found = sorted(set(FORBIDDEN.findall(ptx)))
        assert not found, f"{name}: {found}"
        fused = len(FUSED.findall(ptx))
        match name:
            case "gemm_kernel":  # the dot product's, and none in what follows it
                rows, columns, depth = constants["TILE"]
                assert fused > 0, name
                assert fused % (rows * columns * depth // THREADS) == 0, f"{name}: {fused} fused"
            case "mlp_kernel":
                assert fused > 0, name
                assert "atom.global.gpu.acq_rel" in ptx, name
            case "sgd_kernel":
                assert fused > 0, name
            case _:
                assert not fused, f"{name}: {fused} fused"
        compiled[name] = compiled.get(name, 0) + 1

    return launch


def on_cuda(*shape: int, dtype: str = "float32") -> Tensor:
    return from_numpy(np.ones(shape, dtype)).to("cuda")


def elements() -> None:
    x, column = on_cuda(5, 7), on_cuda(5, 1)
    for operator in (engine.add, engine.subtract, engine.multiply, engine.divide):
        operator(x, x)
    engine.multiply(column, x)
    engine.divide(x, on_cuda(1))
    engine.divide(x.T, on_cuda(7, 5))
    engine.divide(on_cuda(5, dtype="float64"), on_cuda(5, dtype="float64"))
    engine.exp(x)
    engine.log(x)
    engine.relu(x)
    engine.operator("octavo::relu_gradient")(x, x)
    for dtype in ("float64", "float16", "uint8"):
        engine.zeros((3,), dtype, device="cuda")
    engine.copy_(on_cuda(7, 5).T, x)
    for rate in (0.1, on_cuda(1)):
        engine.sgd_(x, x, None, rate)
        engine.sgd_(x, x, on_cuda(5, 7), rate, 0.9, 0.1, True)
        engine.adam_(x, x, on_cuda(5, 7), on_cuda(5, 7), on_cuda(1), rate)


def rows() -> None:
    x, labels = on_cuda(300, 10), on_cuda(300, dtype="int64")
    for operator in (engine.softmax, engine.log_softmax, engine.argmax):
        operator(x)
    engine.cross_entropy(x, labels)
    engine.cross_entropy_both(x, labels)
    engine.operator("octavo::cross_entropy_gradient")(x, labels, on_cuda())
    for axis in (None, 0, 1):
        x.sum(axis)
    on_cuda(1000, 50).sum()
    engine.take_rows(x, labels)
    engine.take_rows(on_cuda(300, 3, dtype="uint8"), labels)


def products() -> None:
    x, weight, bias = on_cuda(128, 784), on_cuda(784, 256), on_cuda(256)
    engine.linear_relu(x, weight, bias)
    engine.matmul(x.T, on_cuda(128, 256))
    engine.masked_matmul(on_cuda(128, 10), on_cuda(256, 10).T, on_cuda(128, 256))
    engine.add_matmul_(on_cuda(2048, 2048), on_cuda(2048, 64), on_cuda(64, 2048), 0.5)
    scale, out = on_cuda(1), on_cuda(128, 256)
    for rounding in (Rounding.NEAREST_EVEN, Rounding.STOCHASTIC):
        modes = cuda_casts.Modes(format=E4M3FN, rounding=rounding, seed=1)
        cast = cuda_casts.Cast(modes=modes, scale=scale, codes=on_cuda(128, 256, dtype="uint8"), amax=on_cuda(1))
        cuda_products.product(x, weight, out, relu=True, scales=(scale, scale), cast=cast)
        cuda_casts.encode(x, scale, cuda_casts.Modes(format=E5M2, rounding=rounding, seed=1))
    cuda_casts.decode(on_cuda(7, dtype="uint8"), E5M2)


def training() -> None:
    weights = on_cuda(784, 256), on_cuda(256), on_cuda(256, 10), on_cuda(10)
    order = on_cuda(256, dtype="int64")
    cuda_mlp.train(on_cuda(500, 784), on_cuda(500, dtype="int64"), order, weights, batch=128, rate=0.1)


def main() -> None:
    driver.set_active(Hopper())
    triton.JITFunction.__getitem__ = compile_only
    cuda_memory.INTERPRETED = True  # memory is the host's
    cuda_checks._look = lambda place, explain: None  # no kernel has written there
    assert not cuda_launch.INTERPRETED
    elements()
    rows()
    products()
    training()
    for name, count in compiled.items():
        print(f"{name}: {count} times")
    modules = (cuda_element_kernels, cuda_row_kernels, cuda_gemm_kernels, cuda_mlp_kernels)
    every = {name for module in modules for name in dir(module) if name.endswith("_kernel")}
    assert every <= set(compiled), every - set(compiled)
    print("all kernels compile")


if __name__ == "__main__":
    main()
