"""The GPU backend's casts of tensors that one scale serves, and what its casts of matrices share with them."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from octavo.formats import E4M3FN, E5M2, Format
from octavo.kernels import cuda_kernels, cuda_wide
from octavo.kernels.cuda_bits import HARDWARE, Kind, constants, mode_of
from octavo.reference import reject_nan
from octavo.rounding import Overflow, Rounding, checked_draws

__all__ = ["amax", "decode", "encode", "encode_transposed", "quantize", "random_bits"]

BLOCK = 2048
"""Elements to a program of an elementwise kernel: 16 to a thread, one full memory access of a 16-byte vector for codes."""
STEPS = 8
"""Blocks to a program that only takes the amax, so that few meet at the atomic maximum."""
TILE = 64
"""Rows and columns to a program that transposes."""
_KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.float16: Kind.FLOAT16}
_INTERPRETED = not isinstance(cuda_kernels.cast_kernel, triton.JITFunction)
LAUNCH: dict[str, Any] = {} if _INTERPRETED else {"enable_fp_fusion": False}
"""What every launch says: that products and sums are rounded one by one."""


def source_of(x: Tensor) -> Tensor:
    """`x` in row-major memory, without gradients.  Raises ValueError for a tensor that no kernel here can read."""
    if x.device.type != "cuda" and not _INTERPRETED:
        raise ValueError(f"these casts run on a CUDA device, and the tensor is on {x.device}; move it first (x.cuda())")
    if x.dtype not in _KINDS and x.dtype is not torch.float64:
        raise ValueError(
            f"a cast takes float32, float64, float16 or bfloat16; got {x.dtype}: convert it to float32 first"
        )
    return x.detach().resolve_neg().contiguous()


def kernel_view(x: Tensor) -> tuple[Tensor, int]:
    """A float32, bfloat16 or float16 tensor as the kernels take it, and its `Kind`."""
    return (x.view(torch.int16) if x.dtype is torch.bfloat16 else x), int(_KINDS[x.dtype])


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Within it, kernels run where `x` is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def new_state(x: Tensor) -> Tensor:
    """What kernels gather magnitudes in: int32 [2], zeros."""
    return torch.zeros(2, dtype=torch.int32, device=x.device)


def code_dtype(format: Format) -> torch.dtype:
    """What codes are held in."""
    return torch.uint8 if format.bits <= 8 else torch.uint32


def amax_of(state: Tensor) -> Tensor:
    """The amax that kernels gathered: float32, no dimensions."""
    return state[0].view(torch.float32)


def scale_tensor(scale: float | Tensor, x: Tensor) -> Tensor:
    """A scale where `x` is: float32 [1]."""
    if isinstance(scale, Tensor):
        return scale.detach().to(x.device, torch.float32).reshape(1)
    with np.errstate(over="ignore", under="ignore"):
        return torch.full((1,), float(np.float32(scale)), device=x.device)


def seed_words(rounding: Rounding, seed: int | None, offset: int, size: int) -> dict[str, int]:
    """The kernels' arguments for stochastic rounding: the seed's two words as int32, and the offset."""
    seed, offset = checked_draws(rounding, seed, offset, size)
    low, high = (seed >> shift & 0xFFFFFFFF for shift in (0, 32))
    return {"seed_low": _signed(low), "seed_high": _signed(high), "offset": offset}


def _signed(word: int) -> int:
    """The int32 of the same bits."""
    return word - (word >> 31 << 32)


@functools.cache
def _has_instruction(device: torch.device) -> bool:
    """Whether the processor rounds float32 to E4M3FN and E5M2 by itself."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def fast_mode(format: Format, rounding: Rounding, overflow: Overflow, device: torch.device) -> int:
    """The MODE of the kernels: the processor's own instruction where it does the same."""
    direct = rounding is Rounding.NEAREST_EVEN and overflow is Overflow.SATURATE and format in (E4M3FN, E5M2)
    return int(HARDWARE.value) if direct and _has_instruction(device) else mode_of(rounding)


def in_float64(x: Tensor, format: Format) -> bool:
    """Whether a cast is one of the rare ones, of `cuda_wide`."""
    return x.dtype is torch.float64 or not format.signed


def encode(
    x: Tensor,
    format: Format,
    *,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor:
    """`octavo.encode` on the GPU: the codes of `x`, uint8 of its shape."""
    return _cast(x, format, None, rounding, overflow, seed, offset, codes=True)


def quantize(
    x: Tensor,
    format: Format,
    *,
    scale: float = 1.0,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor:
    """`octavo.quantize` on the GPU: `decode(encode(x * scale)) / scale`, in x's dtype and shape."""
    with np.errstate(over="ignore", under="ignore"):
        used = float(scale if x.dtype is torch.float64 else np.float32(scale))
    if not (0 < used < math.inf):
        raise ValueError(f"a scale is positive and finite (in float32, unless x is float64); got {scale}")
    return _cast(x, format, used, rounding, overflow, seed, offset, codes=False)


def _cast(
    x: Tensor,
    format: Format,
    scale: float | None,
    rounding: Rounding,
    overflow: Overflow,
    seed: int | None,
    offset: int,
    *,
    codes: bool,
) -> Tensor:
    x = source_of(x)
    words = seed_words(rounding, seed, offset, x.numel())
    if not in_float64(x, format):
        out, state = cast_with_amax(x, format, scale, rounding, overflow, words, codes=codes, amax=not format.has_nan)
        if not format.has_nan and bool(amax_of(state).isnan()):
            raise reject_nan(format)
        return out
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    factor = torch.full(
        (1,), 1.0 if scale is None else scale, dtype=wide, device=x.device
    )  # torch divides by a number inexactly
    scaled = (x.to(wide) * factor).double()
    if not format.has_nan and bool(scaled.isnan().any()):
        raise reject_nan(format)
    draws = None
    if rounding is Rounding.STOCHASTIC:
        draws = random_bits(seed or 0, offset, x.numel(), x.device).reshape(x.shape)
    out = cuda_wide.encode(scaled, format, rounding, overflow, draws).to(code_dtype(format))
    if codes:
        return out
    values = decode(out, format).to(wide)
    return (values / factor).to(x.dtype)


def cast_with_amax(
    x: Tensor,
    format: Format,
    scale: float | Tensor | None,
    rounding: Rounding,
    overflow: Overflow,
    words: dict[str, int],
    *,
    codes: bool = True,
    amax: bool = True,
) -> tuple[Tensor, Tensor]:
    """The codes of `x * scale`, or those decoded and over the scale in x's dtype; and the state, with x's amax where that is wanted.

    x: from `source_of`, not float64; words: from `seed_words`.  One read of x.
    """
    out = torch.empty_like(x, dtype=code_dtype(format)) if codes else torch.empty_like(x)
    state = new_state(x)
    source, kind = kernel_view(x)
    shift = words["offset"] % 4 if rounding is Rounding.STOCHASTIC else 0
    if x.numel():
        with device_of(x):
            cuda_kernels.cast_kernel[(triton.cdiv(x.numel() + shift, BLOCK),)](
                source,
                out if codes else kernel_view(out)[0],
                scale_tensor(1.0 if scale is None else scale, x),
                state,
                x.numel(),
                **words,
                FORMAT=constants(format, overflow, rounding),
                MODE=fast_mode(format, rounding, overflow, x.device),
                KIND=kind,
                TARGET=int(Kind.CODES) if codes else kind,
                AMAX=amax,
                SHIFT=shift,
                BLOCK=BLOCK,
                **LAUNCH,
            )
    return out, state


def encode_transposed(
    x: Tensor,
    format: Format,
    *,
    scale: float | Tensor = 1.0,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of `x * scale`, uint8 [rows, columns]; the same transposed, [columns, rows]; and x's amax, float32, in one read of x.

    x: [rows, columns], not float64; format: a signed one.  Random bits go by an element's place in x.
    """
    x = source_of(x)
    if in_float64(x, format) or x.ndim != 2:
        raise ValueError(
            f"a cast with its transpose takes a float32, bfloat16 or float16 matrix to a signed format; got "
            f"{x.dtype} of shape {tuple(x.shape)} to {format.name}"
        )
    words = seed_words(rounding, seed, offset, x.numel())
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=code_dtype(format))
    turned = torch.empty((columns, rows), dtype=codes.dtype, device=x.device)
    state = new_state(x)
    source, kind = kernel_view(x)
    if x.numel():
        with device_of(x):
            cuda_kernels.transposed_kernel[(triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE),)](
                source,
                codes,
                turned,
                scale_tensor(scale, x),
                state,
                rows,
                columns,
                **words,
                FORMAT=constants(format, overflow, rounding),
                MODE=fast_mode(format, rounding, overflow, x.device),
                KIND=kind,
                AMAX=True,
                TILE=TILE,
                **LAUNCH,
            )
    if not format.has_nan and bool(amax_of(state).isnan()):
        raise reject_nan(format)
    return codes, turned, amax_of(state)


def decode(codes: Tensor, format: Format) -> Tensor:
    """`octavo.decode` on the GPU: the values of `codes`, float32 of their shape."""
    if codes.dtype is not code_dtype(format):
        held = str(code_dtype(format)).removeprefix("torch.")
        raise ValueError(f"codes of {format.name} are {held}; got {codes.dtype}: `encode` makes them")
    codes = codes.contiguous()
    if codes.numel() and format.bits != 8:
        largest = int(codes.long().amax())
        if largest >= 1 << format.bits:
            raise ValueError(f"{format.name} has codes 0 to {(1 << format.bits) - 1}; got {largest}")
    if not format.signed:
        return cuda_wide.decode(codes, format)
    out = torch.empty_like(codes, dtype=torch.float32)
    if codes.numel():
        with device_of(codes):
            cuda_kernels.decode_kernel[(triton.cdiv(codes.numel(), BLOCK),)](
                codes,
                out,
                codes.numel(),
                FORMAT=constants(format, Overflow.SATURATE, Rounding.NEAREST_EVEN),
                BLOCK=BLOCK,
                **LAUNCH,
            )
    return out


def amax(x: Tensor) -> Tensor:
    """The largest magnitude in `x`, no dimensions, float64 of float64 and else float32: 0 of an empty tensor, NaN if x holds NaN."""
    x = source_of(x)
    if x.dtype is torch.float64:
        return x.abs().amax() if x.numel() else x.new_zeros(())
    state = new_state(x)
    source, kind = kernel_view(x)
    if x.numel():
        with device_of(x):
            cuda_kernels.amax_kernel[(triton.cdiv(x.numel(), BLOCK * STEPS),)](
                source, state, x.numel(), KIND=kind, BLOCK=BLOCK, STEPS=STEPS, **LAUNCH
            )
    return amax_of(state)


def random_bits(seed: int, offset: int, count: int, device: torch.device | str) -> Tensor:
    """`octavo.rounding.random_bits` on the GPU, as int64 [count]."""
    words = seed_words(Rounding.STOCHASTIC, seed, offset, count)
    out = torch.empty(count, dtype=torch.int32, device=device)
    if count:
        with device_of(out):
            cuda_kernels.random_kernel[(triton.cdiv(count, BLOCK),)](out, count, **words, BLOCK=BLOCK, **LAUNCH)
    return out.long() & 0xFFFFFFFF
