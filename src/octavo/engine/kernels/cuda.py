"""The engine's operators on CUDA, one table; by Triton, in memory of CuPy's.  Beside them, `Graph` captures a step, and `train` runs many
steps of a perceptron in one launch.

Under `TRITON_INTERPRET=1`, set before Triton is imported, CUDA tensors lie in host memory and the same kernels run there, slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import torch  # noqa: F401  # Triton finds the GPU by it
    import triton  # noqa: F401
except ModuleNotFoundError as error:
    raise ValueError(
        f"the engine's CUDA tensors need {error.name}, which is not installed: pip install torch triton cupy-cuda12x, or use device='cpu'"
    ) from None

from octavo.engine.kernels import cpu, cuda_elements, cuda_products, cuda_rows
from octavo.engine.kernels.cuda_element_kernels import Operation
from octavo.engine.kernels.cuda_graph import Graph
from octavo.engine.kernels.cuda_launch import launches
from octavo.engine.kernels.cuda_memory import allocate, from_dlpack, move, to_dlpack
from octavo.engine.kernels.cuda_mlp import train
from octavo.names import nearest

__all__ = ["KERNELS", "Graph", "allocate", "from_dlpack", "kernel", "launches", "move", "to_dlpack", "train"]

KERNELS: dict[str, Callable[..., Any]] = {
    "full": cuda_elements.full,
    "add": cuda_elements.arithmetic(Operation.ADD),
    "subtract": cuda_elements.arithmetic(Operation.SUBTRACT),
    "multiply": cuda_elements.arithmetic(Operation.MULTIPLY),
    "divide": cuda_elements.arithmetic(Operation.DIVIDE),
    "exp": cuda_elements.unary(Operation.EXP),
    "log": cuda_elements.unary(Operation.LOG),
    "matmul": cuda_products.matmul,
    "masked_matmul": cuda_products.masked_matmul,
    "add_matmul_": cuda_products.add_matmul,
    "linear": cuda_products.linear,
    "linear_relu": cuda_products.linear_relu,
    "relu": cuda_elements.relu,
    "relu_gradient": cuda_elements.relu_gradient,
    "sum": cuda_rows.sum_,
    "softmax": cuda_rows.softmax(False),
    "log_softmax": cuda_rows.softmax(True),
    "cross_entropy": cuda_rows.cross_entropy,
    "cross_entropy_gradient": cuda_rows.cross_entropy_gradient,
    "cross_entropy_both": cuda_rows.cross_entropy_both,
    "argmax": cuda_rows.argmax,
    "permute": cpu.KERNELS["permute"],
    "reshape": cuda_products.reshape,
    "index": cpu.KERNELS["index"],
    "take_rows": cuda_rows.take_rows,
    "copy_": cuda_elements.copy_,
    "sgd_": cuda_elements.sgd,
    "adam_": cuda_elements.adam,
}
"""Operator -> its kernel."""


def kernel(name: str) -> Callable[..., Any]:
    """What runs `octavo::name` on CUDA tensors.  Raises ValueError for an operator that has no kernel there."""
    if name not in KERNELS:
        raise ValueError(
            f"octavo::{name} has no CUDA kernel{nearest(name, KERNELS)}; move its tensors to the CPU with .to('cpu')"
        )
    return KERNELS[name]
