"""The chips that `octavo validate` knows: one row each, every figure with its source.

Figures are peaks of the makers, dense (without 2:4 sparsity), at boost clocks; what a GEMM reaches is less.  Rates are in TFLOP/s, a
multiply-add being two, memory bandwidth in TB/s, and the floor under a kernel's time in microseconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from octavo.formats import E2M1FN, E2M3FN, E3M2FN, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, Format
from octavo.names import nearest

__all__ = ["CHIPS", "Arithmetic", "Chip", "Figure", "Kernel", "Scales", "get_chip"]


class Arithmetic(enum.Enum):
    """What a unit multiplies; sums are float32."""

    FP32 = "FP32"
    """float32, without TF32."""
    TF32 = "TF32"
    """float32 tensors whose operands are cut to 10 bits of mantissa."""
    FP16 = "FP16"
    """float16."""
    BF16 = "BF16"
    """bfloat16."""
    FP8 = "FP8"
    """Formats of 8 bits."""
    FP6 = "FP6"
    """Formats of 6 bits."""
    FP4 = "FP4"
    """Formats of 4 bits."""

    @property
    def bytes(self) -> int:
        """Of an element in memory, of the formats of 16 and 32 bits."""
        match self:
            case Arithmetic.FP32 | Arithmetic.TF32:
                return 4
            case Arithmetic.FP16 | Arithmetic.BF16:
                return 2
            case Arithmetic.FP8 | Arithmetic.FP6 | Arithmetic.FP4:
                raise AssertionError(f"{self} is measured in bits")


class Scales(enum.Enum):
    """The scales that a kernel takes beside its two operands, along the contracted axis."""

    TENSOR = "one a tensor"
    """A float32 for each operand; 1 where there is none."""
    ROW = "one a row"
    """A float32 for each row of the left operand and each column of the right."""
    BLOCKS_128 = "blocks of 128"
    """A float32 for each 1x128 of one operand, and each 1x128 or 128x128 of the other."""
    MX = "MX, 1x32"
    """An E8M0 for each 1x32."""
    NVFP4 = "NVFP4, 1x16"
    """An E4M3 for each 1x16, and a float32 a tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number and the document, with its table, that it is from."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """Matrix products of at most 8 bits that a library has for a chip."""

    name: str
    arithmetic: Arithmetic
    formats: tuple[Format, ...]
    """Of the operands, in any pair, but for the next field."""
    scales: Scales
    align_k: int
    """The contracted axis is a multiple of it."""
    align_n: int
    """And the columns of the result are of this."""
    source: str
    both_e5m2: bool = False
    """Whether both operands may be E5M2."""
    in_octavo: bool = False
    """Whether `octavo.torch` calls it; what it does not call, it emulates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A target: how fast it multiplies and reads, and what it multiplies."""

    name: str
    words: str
    peaks: Mapping[Arithmetic, Figure]
    """TFLOP/s, dense; what is missing it does not multiply."""
    bandwidth: Figure
    """TB/s of its memory."""
    floor: Figure
    """Microseconds that no kernel stays below."""
    kernels: tuple[Kernel, ...] = ()
    contracted_last: bool = False
    """Whether FP8 operands have to lie with the contracted axis last, so that a second GEMM needs them transposed."""
    hopper_sums: bool = False
    """Whether its sums are those of `Accumulator.HOPPER_FAST` and `HOPPER_SPLIT`."""
    holds_values: bool = False
    """Whether Octavo's emulation holds operands as values, at once, where it decodes codes on others."""


_CUBLAS = (
    "cuBLAS documentation, cublasLtMatmul(): tables of narrow-precision types and scaling modes by compute capability"
)
_SCALED_MM = "PyTorch, RowwiseScaledMM.cu: CUTLASS kernels for sm89, sm90 and sm100"
_CUTLASS = "CUTLASS documentation, Blackwell SM100 GEMMs: block-scaled types and their alignments"
_HIPBLASLT = (
    "hipBLASLt documentation, Data type support: FNUZ types on gfx942 alone; PyTorch, CUDABlas.cpp: outer-vector scales"
)
_OCP = (E4M3FN, E5M2)
_TENSORWISE = Kernel(
    name="cuBLASLt FP8 tensorwise",
    arithmetic=Arithmetic.FP8,
    formats=_OCP,
    scales=Scales.TENSOR,
    align_k=16,
    align_n=16,
    source=_CUBLAS,
    in_octavo=True,
)
_ROWWISE = Kernel(
    name="CUTLASS FP8 rowwise",
    arithmetic=Arithmetic.FP8,
    formats=_OCP,
    scales=Scales.ROW,
    align_k=16,
    align_n=16,
    source=_SCALED_MM,
)
_BLOCKWISE = Kernel(
    name="cuBLASLt FP8 blockwise",
    arithmetic=Arithmetic.FP8,
    formats=_OCP,
    scales=Scales.BLOCKS_128,
    align_k=16,
    align_n=16,
    source=_CUBLAS,
)


def _block_scaled(
    name: str, arithmetic: Arithmetic, formats: tuple[Format, ...], scales: Scales, align_k: int, source: str
) -> Kernel:
    """A kernel of Blackwell's for scales that lie beside the operands."""
    return Kernel(
        name=name,
        arithmetic=arithmetic,
        formats=formats,
        scales=scales,
        align_k=align_k,
        align_n=16,
        source=source,
    )


_BLACKWELL = (
    _block_scaled("cuBLASLt MXFP8", Arithmetic.FP8, _OCP, Scales.MX, 32, _CUBLAS),
    _block_scaled("CUTLASS MXFP6", Arithmetic.FP6, (E3M2FN, E2M3FN), Scales.MX, 128, _CUTLASS),
    _block_scaled("CUTLASS MXFP4", Arithmetic.FP4, (E2M1FN,), Scales.MX, 32, _CUTLASS),
    _block_scaled("cuBLASLt NVFP4", Arithmetic.FP4, (E2M1FN,), Scales.NVFP4, 32, _CUBLAS),
)
_FNUZ = tuple(
    Kernel(
        name=f"hipBLASLt FP8 {word}",
        arithmetic=Arithmetic.FP8,
        formats=(E4M3FNUZ, E5M2FNUZ),
        scales=scales,
        align_k=16,
        align_n=16,
        source=_HIPBLASLT,
        both_e5m2=True,
    )
    for word, scales in (("tensorwise", Scales.TENSOR), ("rowwise", Scales.ROW))
)


def _peaks(source: str, **rates: float) -> Mapping[Arithmetic, Figure]:
    """Rates by the names of `Arithmetic`, all from one table."""
    return MappingProxyType({Arithmetic[name]: Figure(value=rate, source=source) for name, rate in rates.items()})


_NOMINAL = "nominal: one core at 3 GHz with 16 lanes of AVX-512 and its BF16 instruction; measured ones vary by a factor of ten"
_LAUNCH = Figure(value=3.0, source="nominal: empty kernels in a stream follow each other in 2 to 5 microseconds")
_A100 = "NVIDIA A100 Tensor Core GPU data sheet, specifications, A100 80GB SXM"
_L40S = "NVIDIA L40S data sheet, specifications, the dense figure of each pair"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture white paper, peak rates of the H100 SXM5, dense"
_B200 = "NVIDIA Blackwell Architecture Technical Brief, specifications of the HGX B200 per GPU, dense"
_MI300X = "AMD Instinct MI300X data sheet, peak rates without sparsity, FP32 of its matrix cores"

_ROWS = (
    Chip(
        name="cpu",
        words="a processor core with AVX-512 BF16; 8 bits are emulated",
        peaks=_peaks(_NOMINAL, FP32=0.1, FP16=0.1, BF16=0.2),
        bandwidth=Figure(value=0.012, source=_NOMINAL),
        floor=Figure(value=5.0, source="nominal: an eager PyTorch operator on the CPU"),
        holds_values=True,
    ),
    Chip(
        name="sm80",
        words="NVIDIA A100 SXM, 80 GB",
        peaks=_peaks(_A100, FP32=19.5, TF32=156.0, FP16=312.0, BF16=312.0),
        bandwidth=Figure(value=2.039, source=_A100),
        floor=_LAUNCH,
    ),
    Chip(
        name="sm89",
        words="NVIDIA L40S",
        peaks=_peaks(_L40S, FP32=91.6, TF32=183.0, FP16=362.05, BF16=362.05, FP8=733.0),
        bandwidth=Figure(value=0.864, source=_L40S),
        floor=_LAUNCH,
        kernels=(_TENSORWISE, _ROWWISE),
        contracted_last=True,
    ),
    Chip(
        name="sm90",
        words="NVIDIA H100 SXM, 80 GB",
        peaks=_peaks(_H100, FP32=66.9, TF32=494.7, FP16=989.4, BF16=989.4, FP8=1978.9),
        bandwidth=Figure(value=3.35, source="NVIDIA H100 Tensor Core GPU data sheet, specifications, H100 SXM"),
        floor=_LAUNCH,
        kernels=(_TENSORWISE, _ROWWISE, _BLOCKWISE),
        contracted_last=True,
        hopper_sums=True,
    ),
    Chip(
        name="sm100",
        words="NVIDIA B200 (HGX)",
        peaks=_peaks(_B200, FP32=80.0, TF32=1100.0, FP16=2250.0, BF16=2250.0, FP8=4500.0, FP6=4500.0, FP4=9000.0),
        bandwidth=Figure(value=8.0, source=_B200),
        floor=_LAUNCH,
        kernels=(_TENSORWISE, _ROWWISE, *_BLACKWELL),
    ),
    Chip(
        name="gfx942",
        words="AMD Instinct MI300X",
        peaks=_peaks(_MI300X, FP32=163.4, TF32=653.7, FP16=1307.4, BF16=1307.4, FP8=2614.9),
        bandwidth=Figure(value=5.3, source=_MI300X),
        floor=_LAUNCH,
        kernels=_FNUZ,
    ),
)

CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _ROWS})
"""Every target by name."""


def get_chip(name: str) -> Chip:
    """The named target.  Raises ValueError, with the nearest name, where there is none."""
    if name not in CHIPS:
        raise ValueError(f"target is one of {', '.join(CHIPS)}; got {name!r}{nearest(name, CHIPS)}")
    return CHIPS[name]
