"""The GPU backend: `octavo.reference` on CUDA tensors, bit for bit, in Triton.

Nothing here waits for the device, but for the formats without NaN (FP6, FP4): whether the input holds one is read back.
Under `TRITON_INTERPRET=1`, set before Triton is imported, the same kernels run on CPU tensors, slowly.
"""

from octavo.kernels.cuda_casts import amax, decode, encode, encode_transposed, quantize, random_bits
from octavo.kernels.cuda_matrices import decode_matrix, encode_matrix, hadamard, quantize_matrix

__all__ = [
    "amax",
    "decode",
    "decode_matrix",
    "encode",
    "encode_matrix",
    "encode_transposed",
    "hadamard",
    "quantize",
    "quantize_matrix",
    "random_bits",
]
