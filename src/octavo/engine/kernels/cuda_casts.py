"""Casts of the engine's tensors to 8-bit formats on the GPU: codes, and the amax of what was cast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.engine.kernels.cuda_launch import At, launch
from octavo.engine.kernels.cuda_memory import contiguous, fill
from octavo.engine.tensor import Tensor, empty
from octavo.formats import Format
from octavo.kernels import cuda_kernels
from octavo.kernels.cuda_bits import Kind, constants, mode_of
from octavo.rounding import Overflow, Rounding, checked_draws

__all__ = ["Cast", "Modes", "decode", "encode"]

_BLOCK = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Modes:
    """How numbers become codes of an 8-bit format: see `octavo.encode`."""

    format: Format
    rounding: Rounding = Rounding.NEAREST_EVEN
    overflow: Overflow = Overflow.SATURATE
    seed: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        if not self.format.signed or self.format.bits > 8 or not self.format.has_nan:
            raise ValueError(
                f"the engine's GPU kernels cast to signed formats of at most 8 bits with NaN; got {self.format.name}: "
                "cast on the CPU"
            )

    def words(self, size: int) -> tuple[int, int, int]:
        """The seed's two words, as int32, and the offset."""
        seed, offset = checked_draws(self.rounding, self.seed, self.offset, size)
        low, high = (seed >> shift & 0xFFFFFFFF for shift in (0, 32))
        return low - (low >> 31 << 32), high - (high >> 31 << 32), offset

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels take as FORMAT and MODE."""
        return {
            "FORMAT": constants(self.format, self.overflow, self.rounding),
            "MODE": mode_of(self.rounding),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """What a product is cast to as it is made: codes, uint8 [M, N], of it times scale, float32 [1]; amax, float32 [1], of it unscaled."""

    modes: Modes
    scale: Tensor
    codes: Tensor
    amax: Tensor


def encode(x: Tensor, scale: Tensor, modes: Modes) -> tuple[Tensor, Tensor]:
    """The codes of x * scale, uint8 of x's shape, and x's amax, float32 [1], in one read of x.

    x: float32; scale: float32, of one element, on the GPU too.  NaN and Inf as in `octavo.encode`; random bits go by an element's place.
    """
    x = contiguous(x)
    if x.dtype != np.float32 or scale.dtype != np.float32 or scale.size != 1:
        raise ValueError(
            f"the engine casts float32 with one float32 scale; got {x.dtype}, and a scale {scale.dtype} {list(scale.shape)}"
        )
    codes, amax = empty(x.shape, np.uint8, device=x.device), empty((1,), device=x.device)
    fill(amax.address, 1, 0, amax.dtype)
    low, high, offset = modes.words(x.size)
    shift = offset % 4 if modes.rounding is Rounding.STOCHASTIC else 0
    launch(
        cuda_kernels.cast_kernel,
        -(-(x.size + shift) // _BLOCK) if x.size else 0,
        x,
        codes,
        scale,
        At(amax.address, "int32"),
        x.size,
        low,
        high,
        offset,
        **modes.constants,
        KIND=int(Kind.FLOAT32),
        TARGET=int(Kind.CODES),
        AMAX=True,
        SHIFT=shift,
        BLOCK=_BLOCK,
    )
    return codes, amax


def decode(codes: Tensor, format: Format) -> Tensor:
    """The values, float32, of codes, uint8 of any shape, of a format that `Modes` takes."""
    codes = contiguous(codes)
    if codes.dtype != np.uint8:
        raise ValueError(f"codes of {format.name} are uint8; got {codes.dtype}: `encode` makes them")
    out = empty(codes.shape, device=codes.device)
    launch(
        cuda_kernels.decode_kernel,
        -(-codes.size // _BLOCK),
        codes,
        out,
        codes.size,
        FORMAT=Modes(format=format).constants["FORMAT"],
        BLOCK=_BLOCK,
    )
    return out
