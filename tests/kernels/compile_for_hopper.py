"""Compile every GPU kernel for Hopper, which needs no GPU, and look at the instructions: run by test_cuda.py.

The launches are those of `octavo.kernels.cuda` on CPU tensors, but that what would be launched is only compiled.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from octavo.formats import E2M1FN, E4M3FN, E5M2, TF32
from octavo.kernels import cuda, cuda_casts
from octavo.recipes import block_scaling, delayed_scaling, mxfp8, nvfp4, rowwise
from octavo.reference import Codes
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Block, BlockScale, TwoLevel
from octavo.table import TensorSpec

FORBIDDEN = re.compile(r"\S*ftz\S*|fma\.\S*f32|mad\.\S*f32|div\.(?:full|approx)\S*|rcp\.\S*")
"""Instructions that flush subnormals, round once for two operations, or do not round to nearest."""


class Hopper:
    """What Triton asks of a driver before it launches."""

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
        ptx = kernel.warmup(*arguments, grid=grid, **constants).asm["ptx"]
        found = sorted(set(FORBIDDEN.findall(ptx)))
        assert not found, f"{kernel.__name__}: {found}"
        hardware = "satfinite.e4m3x2" in ptx or "satfinite.e5m2x2" in ptx
        asked = constants.get("MODE") == cuda_casts.HARDWARE.value
        assert hardware == asked, f"{kernel.__name__}: asked for the processor's rounding: {asked}, found: {hardware}"
        compiled[kernel.__name__] = compiled.get(kernel.__name__, 0) + 1

    return launch


def matrices(x: torch.Tensor) -> None:
    recipes = (delayed_scaling(), block_scaling(), nvfp4(), mxfp8(), rowwise())
    specs = {str(spec): spec for recipe in recipes for *_, spec in recipe.cells() if spec is not None}
    for spec in specs.values():
        cuda.encode_matrix(x, spec, seed=1)
        is_bytes = isinstance(spec.scaling, TwoLevel) or (
            isinstance(spec.scaling, Block) and spec.scaling.scale.is_e8m0
        )
        scales = torch.zeros((1, 1), dtype=torch.uint8 if is_bytes else torch.float32)
        cuda.decode_matrix(Codes(torch.zeros(x.shape, dtype=torch.uint8), scales, torch.zeros(())), spec)
    for scale in BlockScale:
        cuda.encode_matrix(x.bfloat16(), TensorSpec(E4M3FN, Block(scale=scale, skip_nan=True)))
    cuda.encode_matrix(x.repeat(2, 2), TensorSpec(E4M3FN, Block(shape=(256, 256))))
    cuda.encode_matrix(x[:1, :1], TensorSpec(E4M3FN, Block(shape=(3, 7))))
    cuda.hadamard(x)


def casts(x: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cuda.encode(x.to(dtype), E4M3FN)
        cuda.quantize(x.to(dtype), E5M2, scale=3.0, overflow=Overflow.NONE)
    cuda.encode(x, TF32)
    cuda.decode(torch.zeros(5000, dtype=torch.uint32), TF32)
    cuda.encode(x, E2M1FN, rounding=Rounding.NEAREST_AWAY)
    cuda.encode(x[:1, :1], E5M2, rounding=Rounding.STOCHASTIC, seed=1, offset=3)
    cuda.encode_transposed(x, E4M3FN)
    cuda.encode_transposed(x.bfloat16(), E4M3FN, rounding=Rounding.STOCHASTIC, seed=2)
    cuda.decode(torch.zeros(5000, dtype=torch.uint8), E4M3FN)
    cuda.amax(x)
    cuda.random_bits(1, 1, 100, "cpu")


def main() -> None:
    driver.set_active(Hopper())
    triton.JITFunction.__getitem__ = compile_only
    cuda_casts._INTERPRETED = True
    x = torch.ones(256, 512)
    casts(x)
    matrices(x)
    cuda_casts._has_instruction = lambda device: True
    cuda.encode(x, E4M3FN)
    cuda.encode_transposed(x.bfloat16(), E5M2)
    cuda.encode_matrix(x, TensorSpec(E5M2, Block()))
    for name, count in compiled.items():
        print(f"{name}: {count} times")
    assert set(compiled) == {name for name in dir(cuda_casts.cuda_kernels) if name.endswith("_kernel")}
    print("all kernels compile")


if __name__ == "__main__":
    main()
