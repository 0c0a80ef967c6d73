"""A quantised tensor: codes, scales and what they mean, of NumPy, torch or JAX, ready to be decoded, cut, stored or multiplied."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from octavo.cuts import choose, held_columns, matrix_shape, take
from octavo.reference import SIGNS, Codes, block_shape
from octavo.rounding import checked_draws
from octavo.scaling import Delayed, TwoLevel, scales_in_codes
from octavo.table import TensorSpec, Transform

__all__ = ["FLOATS", "QTensor", "check", "dtype_name", "library_name", "pack", "unpack"]

Array: TypeAlias = Any
"""An array of NumPy, torch or JAX."""

FLOATS = ("float32", "float64", "float16", "bfloat16")
"""What a quantised tensor is made of and decodes to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Library:
    """What this module asks of an array library, and which modules of `octavo.kernels` cast its arrays, by kind of device.

    `dense` gives the same elements without gradients; `convert(x, dtype)` gives them in row-major memory, rounded once.
    """

    module: str
    backends: Mapping[str, str]
    dense: Callable[[Array], Array]
    convert: Callable[[Array, Any], Array]

    @property
    def functions(self) -> Any:
        """The module whose functions work on these arrays."""
        return importlib.import_module(self.module)

    def backend(self, x: Array) -> Any:
        """The module that casts `x`, by `encode_matrix` and `decode_matrix`.  Raises ValueError for a device without one."""
        device = x.device.type if self.module == "torch" else ""
        if device not in self.backends:
            raise ValueError(
                f"octavo casts tensors on {' and '.join(self.backends)}; got one on {device}: move it first (x.cpu())"
            )
        return importlib.import_module(f"octavo.kernels.{self.backends[device]}")


_LIBRARIES: Mapping[str, _Library] = MappingProxyType(
    {
        "numpy": _Library(
            module="numpy",
            backends={"": "matrices"},
            dense=np.asarray,
            convert=lambda x, dtype: np.asarray(x, dtype, order="C"),
        ),
        "torch": _Library(
            module="torch",
            backends={"cpu": "matrices", "cuda": "cuda_matrices"},
            dense=lambda x: x.detach().resolve_neg(),
            convert=lambda x, dtype: x.to(dtype).contiguous(),
        ),
        "jax": _Library(
            module="jax.numpy",
            backends={"": "xla_matrices"},
            dense=lambda x: x,
            convert=lambda x, dtype: x.astype(dtype),
        ),
    }
)


def library_name(x: Array) -> str:
    """`"numpy"`, `"torch"` or `"jax"`, whose array `x` is.  Raises ValueError where it is none of theirs."""
    root = type(x).__module__.partition(".")[0].replace("jaxlib", "jax")
    if root not in _LIBRARIES:
        raise ValueError(
            f"a quantised tensor is made of an array of {', '.join(_LIBRARIES)}; got {type(x).__name__}: wrap it in numpy.asarray"
        )
    return root


def dtype_name(dtype: Any) -> str:
    """A dtype's name without its library: `"bfloat16"`."""
    return str(dtype).rpartition(".")[2]


def pack(codes: Array) -> Array:
    """4-bit codes two a byte, the even one in the low nibble: uint8 [rows, columns] -> [rows, columns / 2], rounded up.

    The last high nibble is 0 where columns are odd.
    """
    xp = _LIBRARIES[library_name(codes)].functions
    if codes.shape[1] % 2:
        codes = xp.concatenate([codes, xp.zeros_like(codes[:, :1])], 1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Array, columns: int) -> Array:
    """What `pack` packed: uint8 [rows, columns]."""
    xp = _LIBRARIES[library_name(packed)].functions
    rows, width = packed.shape
    return xp.stack([packed & 15, packed >> 4], -1).reshape(rows, 2 * width)[:, :columns]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QTensor:
    """A tensor as codes and scales, `x ~ decode(codes) * scales`, cast once along the axis that a GEMM will contract.

    The operand matrix is x as [rows, columns] with the contracted axis last: `axis=-1` takes x as [all leading axes, last]; `axis=0`
    contracts all leading axes, of `x.reshape(-1, last).T`.  A tensor of no or one axis is one row.

    Invariants, which `check` verifies:
        codes    uint8 [rows, columns], columns filled up to a multiple of 16 by a Hadamard transform; in 4-bit formats two a byte,
                 [rows, columns / 2] rounded up, the even column in the low nibble, an odd tail's high nibble 0
        scales   what decoding multiplies with, [rows / across, columns / along] rounded up (`octavo.reference.block_shape`):
                 float32, or uint8 where they are E8M0 codes or, two-level, E4M3 codes
        amax     an array without axes, float32, of the whole tensor, where scales are two-level; None elsewhere
        shape    x's, of any rank; axis  0 or -1
        dtype    what `decode` returns, by default x's: float32, float64, float16 or bfloat16 of the codes' library

    Codes and scales equal `octavo.reference.encode_matrix`'s of the operand matrix bit for bit, whatever the library.  Nothing here
    is differentiable.  Two are equal only if they are the same object.
    """

    codes: Array
    scales: Array
    amax: Any
    spec: TensorSpec
    shape: tuple[int, ...]
    axis: int
    dtype: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        check(self)

    @classmethod
    def encode(
        cls,
        x: Array,
        spec: TensorSpec,
        *,
        axis: int = -1,
        seed: int | None = None,
        offset: int = 0,
        scale: float = 1.0,
    ) -> QTensor:
        """`x` cast as `spec` says, along `axis`.

        x: float32, float64, float16 or bfloat16, any shape and strides; rounded once, from its own dtype.  NaN gives the format's
        NaN, and ValueError where it has none; overflow goes by the spec; -0 is kept where the format has it.
        seed, offset: of stochastic rounding, which needs a seed; element i of the flattened operand matrix, as a transform filled
        it up, draws the bits of position offset + i.  scale: of delayed scaling, positive and finite in float32.
        Raises ValueError for another dtype, library or axis, for a scale where scaling is not delayed, and where blocks do not divide
        the matrix and the spec forbids padding.  Source: `docs/numerics.md`.
        """
        library = _LIBRARIES[library_name(x)]
        _check_spec(spec)
        if dtype_name(x.dtype) not in FLOATS:
            raise ValueError(
                f"a quantised tensor is made of {', '.join(FLOATS)}; got {x.dtype}: convert it to float32 first"
            )
        shape = tuple(x.shape)
        rows, columns = matrix_shape(shape, axis)
        _check_modes(spec, seed, offset, scale, rows * held_columns(spec, columns))
        x = library.dense(x)
        matrix = x.reshape(columns, rows).T if axis == 0 and len(shape) > 1 else x.reshape(rows, columns)
        cast: Codes = library.backend(x).encode_matrix(matrix, spec, scale=float(scale), seed=seed, offset=offset)
        return cls(
            codes=pack(cast.codes) if spec.format.bits <= 4 else cast.codes,
            scales=cast.scales,
            amax=library.functions.asarray(cast.amax) if isinstance(spec.scaling, TwoLevel) else None,
            spec=spec,
            shape=shape,
            axis=axis,
            dtype=x.dtype,
        )

    def decode(self) -> Array:
        """The values, of `shape` and `dtype`, in row-major memory.

        Codes times scales in float32, rounded once to `dtype`; Inf where that cannot hold it.  A Hadamard transform is undone in
        float32, `y @ (diag(signs) @ H16 / 4).T` for each 16 columns, and what it filled up is left out; in those
        sums XLA takes subnormal float32 as 0 on some devices, CPUs among them.
        """
        library = _LIBRARIES[self.library]
        cast = Codes(self.unpacked_codes(), self.scales, np.float32(0) if self.amax is None else self.amax)
        values = library.backend(self.codes).decode_matrix(cast, self.spec)
        columns = matrix_shape(self.shape, self.axis)[1]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if self.spec.transform is Transform.HADAMARD:
                values = _turn_back(values, library.functions)[:, :columns]
            if self.axis == 0 and len(self.shape) > 1:
                values = values.T
            return library.convert(values.reshape(self.shape), self.dtype)

    def unpacked_codes(self) -> Array:
        """The codes of the operand matrix, one a byte: uint8 [rows, columns], columns as a transform filled them up."""
        if self.spec.format.bits > 4:
            return self.codes
        return unpack(self.codes, held_columns(self.spec, matrix_shape(self.shape, self.axis)[1]))

    @property
    def library(self) -> str:
        """Whose arrays it holds: `"numpy"`, `"torch"` or `"jax"`."""
        return library_name(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes held: of codes, scales and amax."""
        return int(self.codes.nbytes) + int(self.scales.nbytes) + (0 if self.amax is None else 4)

    def transposed(self) -> QTensor:
        """The transpose of a matrix, contracted along the same elements: the same codes, none of them copied."""
        if len(self.shape) != 2:
            raise ValueError(f"a transpose is of two axes; got the shape {self.shape}: reshape before encoding")
        return replace(self, shape=self.shape[::-1], axis=-1 - self.axis)

    @property
    def T(self) -> QTensor:
        """`transposed()`."""
        return self.transposed()

    def __getitem__(self, index: Any) -> QTensor:
        """The part that slices of step 1 choose: `q[i:j].decode()` is `q.decode()[i:j]`, bit for bit.

        Bounds fall where blocks end: at multiples of `across` among rows of the operand matrix, of `along` among its columns (of 16,
        too, under a Hadamard transform), or at an axis's end.  A scale that a whole axis shares goes with every part.
        Raises ValueError for a bound inside a block, and for an index that is no slice.
        """
        cut = choose(index, self.shape, self.axis, self.spec)
        codes, held = self.codes, held_columns(self.spec, matrix_shape(self.shape, self.axis)[1])
        if len(cut.columns) < held:
            codes = take(self.unpacked_codes(), cut.columns, 1)
            codes = pack(codes) if self.spec.format.bits <= 4 else codes
        scales = take(take(self.scales, cut.block_rows, 0), cut.block_columns, 1)
        return replace(self, codes=take(codes, cut.rows, 0), scales=scales, shape=cut.shape)

    def __iter__(self) -> Any:
        raise TypeError("a quantised tensor has no elements to go through; decode() it first")

    def __repr__(self) -> str:
        held = f"{list(self.shape)} {dtype_name(self.dtype)} as {self.spec}"
        return f"QTensor({held}, axis {self.axis}, {self.library}, {self.nbytes:,} bytes)"


def check(q: QTensor) -> None:
    """Raise ValueError where `q` breaks an invariant of its class: shapes, dtypes and libraries, and nothing that reads memory."""
    spec = q.spec
    _check_spec(spec)
    rows, columns = matrix_shape(q.shape, q.axis)
    columns = held_columns(spec, columns)
    across, along = block_shape(spec, rows, columns)
    grid = (-(-rows // across), -(-columns // along))
    _check_array("codes", q.codes, "uint8", (rows, -(-columns // 2) if spec.format.bits <= 4 else columns))
    two_level = isinstance(spec.scaling, TwoLevel)
    _check_array("scales", q.scales, "uint8" if scales_in_codes(spec.scaling) else "float32", grid)
    if two_level != (q.amax is not None):
        raise ValueError(
            f"a quantised tensor holds an amax where scales are two-level, and only there; got {q.amax} under {spec}"
        )
    if two_level:
        _check_array("amax", q.amax, "float32", ())
    names = [library_name(x) for x in (q.codes, q.scales, q.amax) if x is not None]
    if len(set(names)) > 1 or (names[0] == "torch") != str(q.dtype).startswith("torch."):
        raise ValueError(f"what a tensor holds is of one library; got {', '.join(names)} and {q.dtype!r}: convert it")
    if dtype_name(q.dtype) not in FLOATS:
        raise ValueError(f"a quantised tensor decodes to {', '.join(FLOATS)}; got {q.dtype}")


def _check_spec(spec: Any) -> None:
    if not isinstance(spec, TensorSpec):
        raise ValueError(f"a spec is an octavo.TensorSpec; got {spec!r}: write TensorSpec(format, scaling)")
    if not spec.format.signed or spec.format.bits > 8:
        what = "holds scales, not tensors" if not spec.format.signed else "is wider than a quantised tensor's 8 bits"
        raise ValueError(f"{spec.format.name} {what}; choose a signed format of at most 8 bits")


def _check_array(name: str, x: Array, dtype: str, shape: tuple[int, ...]) -> None:
    got, sizes = dtype_name(getattr(x, "dtype", type(x).__name__)), tuple(getattr(x, "shape", ()))
    if got != dtype or sizes != shape:
        raise ValueError(
            f"{name} of this shape, axis and spec: {dtype} {list(shape)}; got {got} {list(sizes)}: let QTensor.encode make it"
        )


def _check_modes(spec: TensorSpec, seed: int | None, offset: int, scale: float, size: int) -> None:
    """Raise ValueError for what no backend should have to look at; size: of the matrix, as a transform filled it up."""
    checked_draws(spec.rounding, seed, offset, size)
    with np.errstate(over="ignore", under="ignore"):
        used = float(np.float32(scale))
    if not 0 < used < math.inf:
        raise ValueError(f"a scale is positive and finite in float32; got {scale}")
    if used != 1 and not isinstance(spec.scaling, Delayed):
        raise ValueError(f"a scale is given where scaling is delayed; got {scale} under {spec}: leave it 1")


def _turn_back(y: Array, xp: Any) -> Array:
    """`y @ (diag(SIGNS) @ H16 / 4).T` for each 16 columns: the inverse of `octavo.reference.hadamard`, in float32, in its order of sums."""
    count = math.prod(y.shape) // 16
    groups = y
    for apart in (1, 2, 4, 8):
        pairs = groups.reshape(count, 8 // apart, 2, apart)
        one, other = pairs[:, :, 0], pairs[:, :, 1]
        groups = xp.stack([one + other, one - other], 2)
    signs = xp.asarray(np.array(SIGNS, np.float32), device=y.device)
    return (groups.reshape(count, 16) * 0.25 * signs).reshape(y.shape)
