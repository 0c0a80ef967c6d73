"""The GEMMs of a model, from one forward pass on the meta device: nothing is computed and no memory is taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.diagnose.gemms import Kind, TracedGemm
from octavo.diagnose.outlines import outlined

__all__ = ["TracedGemm", "trace_gemms"]

_aten = torch.ops.aten
_OPERANDS: dict[Any, tuple[int, int]] = {
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.mv: (0, 1),
    _aten.dot: (0, 1),
    _aten.addmm: (1, 2),
    _aten._addmm_activation: (1, 2),
    _aten.addmv: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.addbmm: (1, 2),
}
"""Where the two factors stand among the arguments of what multiplies matrices."""
_REFUSED = {
    _aten._trilinear,
    _aten._scaled_mm,
    _aten._grouped_mm,
    _aten._int_mm,
    _aten._native_multi_head_attention,
    _aten._transformer_encoder_layer_fwd,
}
"""What multiplies matrices in ways that no three GEMMs describe."""
_ATTENDING = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


def trace_gemms(model: nn.Module, *inputs: Tensor, loss: Callable[[Any], Any] | None = None) -> tuple[TracedGemm, ...]:
    """Every product of matrices in `model(*inputs)`, in the order in which they run.

    model, inputs: all parameters, buffers and inputs on the meta device, in any dtype; the model stays in its mode, training or
    evaluation, and keeps no trace.  loss: called on what the model returns, so that its products are found too.
    Linear layers, `mm`, `bmm`, `matmul`, `einsum` and their kin are matrices [tokens, features] x [features, outputs].  Attention is
    its two batches of products, one for each head.  A convolution is its patches [samples x positions, channels x kernel] times its
    filters; a transposed one its input [samples x positions, channels] times filters [channels, channels x kernel], whose products are
    then added up.  Recurrent layers are a product for each step.
    A leaf module's own product has its name; others are called `name.matmul()`, `name.matmul_2()` and so on by the order in which the
    module that calls them does, `scores()` and `context()` in attention, `convolution()` outside a convolution's module.
    Raises ValueError for tensors elsewhere than on the meta device, for a model that fails there, naming the module, and for fused
    products that are none of these (`nn.Bilinear`).
    """
    _check_meta(model, inputs)
    recorder = _Recorder(model)
    try:
        with recorder.named(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), recorder, _Attention(recorder):
            output = model(*inputs)
            if loss is not None:
                recorder.outside()
                loss(output)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{recorder.failed or 'the model'} cannot run on the meta device ({reason}); check the inputs' shapes, and whether it reads "
            "the values of tensors"
        ) from error
    return tuple(recorder.found)


def _check_meta(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    named = [*model.named_parameters(), *model.named_buffers(), *((f"input {i}", x) for i, x in enumerate(inputs))]
    for name, tensor in named:
        if tensor.device.type != "meta":
            raise ValueError(
                f'shapes are traced on the meta device; {name} is on {tensor.device}: use model.to("meta") and such inputs'
            )


class _Attention(TorchFunctionMode):
    """Tells the recorder when an attention runs."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run func."""
        if func not in _ATTENDING:
            return func(*args, **(kwargs or {}))
        self.recorder.attending = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.recorder.attending = False


class _Recorder(TorchDispatchMode):
    """Writes down the products that are dispatched while it is entered."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch loads its compiler here, which takes a second

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.found: list[TracedGemm] = []
        self.attending = False
        self.failed = ""
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        self._counts: list[dict[str, int]] = [{}]

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Within it the modules of the model say which of them runs."""
        handles = []
        for name, module in self.model.named_modules():
            if module is self.model:
                continue
            handles.append(module.register_forward_pre_hook(lambda one, _, name=name: self._enter(name, one)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def outside(self) -> None:
        """What follows belongs to no module."""
        self._running = [("", nn.Module())]

    def _enter(self, name: str, module: nn.Module) -> None:
        self._running.append((name, module))
        self._counts.append({})

    def _leave(self) -> None:
        self._running.pop()
        self._counts.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run func, and write it down if it is a product."""
        operator = func.overloadpacket
        if operator in _OPERANDS:
            left, right = (args[place] for place in _OPERANDS[operator])
            self._matrices(left, right)
        elif operator in _REFUSED:
            where = self._running[-1][0] or "the model"
            raise ValueError(
                f"{where} calls {func.name()}, which is no product of two matrices that a recipe's three GEMMs describe; write it as "
                "matmul or einsum"
            )
        output = outlined(func, args, kwargs or {})
        if output is None:
            try:
                output = func(*args, **(kwargs or {}))
            except RuntimeError:
                self.failed = self._running[-1][0]
                raise
        if operator is _aten.convolution:
            self._convolution(output, *args)
        return output

    def _matrices(self, left: Tensor, right: Tensor) -> None:
        if not left.is_floating_point() or 0 in (left.numel(), right.numel()):
            return
        batch = left.shape[0] if left.dim() == 3 else 1
        tokens = 1 if left.dim() == 1 else left.shape[-2]
        outputs = 1 if right.dim() == 1 else right.shape[-1]
        kind = Kind.ATTENTION if self.attending and left.dim() == 3 else Kind.BATCHED
        if left.dim() < 3:
            kind = Kind.LINEAR if isinstance(self._running[-1][1], nn.Linear) else Kind.MATMUL
        self._write(kind, batch, (tokens, left.shape[-1], outputs), left, right)

    def _convolution(self, output: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> None:
        transposed, groups = rest[4], rest[6]
        if not input.is_floating_point() or 0 in (input.numel(), output.numel()):
            return
        kernel = math.prod(weight.shape[2:])
        if transposed:
            tokens = input.shape[0] * math.prod(input.shape[2:])
            features, outputs = input.shape[1] // groups, weight.shape[1] * kernel
        else:
            tokens = output.shape[0] * math.prod(output.shape[2:])
            features, outputs = weight.shape[1] * kernel, weight.shape[0] // groups
        self._write(Kind.CONVOLUTION, groups, (tokens, features, outputs), input, weight)

    def _write(self, kind: Kind, batch: int, sizes: tuple[int, int, int], left: Tensor, right: Tensor) -> None:
        name, _ = self._running[-1]
        tokens, features, outputs = sizes
        self.found.append(
            TracedGemm(
                layer=self._layer(kind),
                module=name,
                kind=kind,
                batch=batch,
                tokens=tokens,
                features=features,
                outputs=outputs,
                left_grad=left.requires_grad,
                right_grad=right.requires_grad,
            )
        )

    def _layer(self, kind: Kind) -> str:
        """The name of the next product of the module that runs."""
        name, module = self._running[-1]
        counts = self._counts[-1]
        match kind:
            case Kind.ATTENTION:
                word = "context" if counts.get("scores", 0) > counts.get("context", 0) else "scores"
            case Kind.CONVOLUTION:
                word = "convolution"
            case Kind.LINEAR:
                word = "linear"
            case Kind.MATMUL | Kind.BATCHED:
                word = "matmul"
        number = counts[word] = counts.get(word, 0) + 1
        main = kind is Kind.LINEAR or (kind is Kind.CONVOLUTION and isinstance(module, nn.modules.conv._ConvNd))
        if main and number == 1:
            return name or "model"
        return ".".join(part for part in (name, f"{word}()" if number == 1 else f"{word}_{number}()") if part)
