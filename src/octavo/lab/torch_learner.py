"""Training in PyTorch as a configuration says, alone or as one of several replicas."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, assert_never

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from octavo.lab import torch_state
from octavo.lab.config import Config
from octavo.lab.data import Dataset
from octavo.lab.learner import Learner, Rows, Snapshot, Update, shares
from octavo.lab.loop import named_gradients, named_parameters, prepare, require_finite
from octavo.lab.networks import exempt_layers, torch_network
from octavo.lab.optimizers import torch_optimizer
from octavo.lab.replicas import World
from octavo.lab.sections import Parallel, PrecisionKind
from octavo.lab.training import DivergenceError
from octavo.torch import LossScaler, autocast, convert

__all__ = ["TorchLearner", "loss_scaler"]


class TorchLearner(Learner):
    """The network, its optimizer and its data.  world: this process's place among the replicas."""

    framework = "torch"

    def __init__(self, config: Config, data: Dataset, world: World, report: Callable[[str], None] = print) -> None:
        self.config, self.world = config, world
        self.rank, self.replicas = world.rank, world.replicas
        self.device, self.test_samples = str(world.device), len(data.test_labels)
        self.data = _Data(config, data, world.device)
        self.network = torch_network(config.model, config.runconfig.seed, device=self.device)
        if config.recipe is not None:
            convert(self.network, config.recipe, exempt=exempt_layers(config.model, config.exempt))
        self.model = self._parallel()
        self.parameters = list(self.network.parameters())
        self.optimizer = torch_optimizer(config.optimizer.rule, self.parameters, lr=1.0)
        self.scaler = loss_scaler(config, world.device, report)

    def _parallel(self) -> nn.Module:
        """The network as replicas run it."""
        if self.replicas == 1:
            return self.network
        match self.config.runconfig.parallel:
            case Parallel.DDP:
                # Scales are the same on all ranks anyhow: buffers need no broadcast.  Newer torch has another word for it.
                known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
                word = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
                quiet: dict[str, Any] = {word: False}
                model = nn.parallel.DistributedDataParallel(self.network, gradient_as_bucket_view=True, **quiet)
                model.register_comm_hook(None, _added_up)
                return model
            case Parallel.FSDP2:
                if self.config.optimizer.loss_scaling_factor != 1.0:
                    raise ValueError(
                        "parallel: fsdp2 takes no loss scale, as ranks see their own gradients alone; use ddp"
                    )
                torch.distributed.fsdp.fully_shard(self.network)
                return self.network
            case other:
                assert_never(other)

    def _forward(self) -> contextlib.AbstractContextManager[object]:
        """What a forward pass runs in."""
        match self.config.kind:
            case PrecisionKind.FLOAT32:
                return contextlib.nullcontext()
            case PrecisionKind.BFLOAT16:
                return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
            case PrecisionKind.FLOAT16:
                return torch.autocast(self.world.device.type, dtype=torch.float16)
            case PrecisionKind.RECIPE:
                # One block for all layers, so that replicas agree on their amaxes at once.
                return autocast(recipe=self.config.recipe)
            case other:
                assert_never(other)

    def update(self, rows: Rows, step: int, rate: float, *, stop: bool) -> Update:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        _seed(self.config.runconfig.seed, step, self.rank)
        parts = shares(rows, rank=self.rank, replicas=self.replicas, micro=self.config.optimizer.grad_accum_steps)
        # Under a recipe the micro-batches are one block: their amaxes are merged, and the forward scales move once.
        merged = len(parts) > 1 and self.config.recipe is not None
        whole, each = (self._forward, contextlib.nullcontext) if merged else (contextlib.nullcontext, self._forward)
        told, agreed = torch.tensor([0.0, float(stop)], device=self.world.device), None
        with whole():
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                with contextlib.nullcontext() if last else self._unsynchronised():
                    with each():
                        output = self.model(self.data.train_inputs[torch.from_numpy(part)])
                    loss = self._loss(output, part) / len(rows)
                    told[0] += loss.detach()
                    agreed = self._share(told) if last else None
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.sharded:  # there they come averaged
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, float(self.replicas))
        if agreed is not None:
            agreed.wait()
        value, asked = told.tolist()
        if self.config.runconfig.check_loss_values and not math.isfinite(value):
            self._blame(parts, step, value)
        taken = self._step(step)
        return Update(
            loss=value, taken=taken, stop=asked > 0, loss_scale=None if self.scaler is None else self.scaler.value
        )

    def _unsynchronised(self) -> contextlib.AbstractContextManager[object]:
        """A micro-batch after which gradients are not yet added up."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _share(self, told: Tensor) -> torch.distributed.Work | None:
        """Begin to add up what replicas tell, while they go backward."""
        if self.replicas == 1:
            return None
        work: torch.distributed.Work = torch.distributed.all_reduce(told, async_op=True)
        return work

    def _loss(self, output: Tensor, part: Rows, *, testing: bool = False) -> Tensor:
        """The sum of the samples' losses."""
        labels = (self.data.test_labels if testing else self.data.train_labels)[torch.from_numpy(part)]
        loss = F.cross_entropy if self.config.model.disable_softmax else F.nll_loss
        return loss(output.float(), labels, reduction="sum")

    def _step(self, step: int) -> bool:
        """Clip and take the optimizer's step; whether it was taken."""
        options = self.config.optimizer
        if self.scaler is not None:
            self.scaler.unscale(self.optimizer)
        if options.max_gradient_value is not None:
            nn.utils.clip_grad_value_(self.parameters, options.max_gradient_value)
        norm = None
        if options.max_gradient_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, options.max_gradient_norm)
        if self.scaler is not None:
            return self.scaler.step(self.optimizer, step + 1)
        if self.config.runconfig.check_loss_values:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients, math.inf) if norm is None else norm
            if not math.isfinite(float(norm)):
                require_finite([*named_parameters(self.network), *named_gradients(self.network)], step=step + 1)
        self.optimizer.step()
        return True

    def _blame(self, parts: Sequence[Rows], step: int, value: float) -> None:
        """Raise DivergenceError that names where NaN or Inf came up first."""
        for part in parts:
            x = self.data.train_inputs[torch.from_numpy(part)]
            require_finite([("the input", x), *named_parameters(self.network)], step=step + 1)
            with torch.no_grad(), self._forward(), _first_bad(self.network) as found:
                self.network(x)
            if found:
                raise DivergenceError(
                    f"training stopped at step {step + 1}: the output of layer {found[0]!r} holds NaN or Inf; lower the learning rate, "
                    "clip gradients, or exempt the layer"
                )
        raise DivergenceError(f"training stopped at step {step + 1}: the loss is {value}; lower the learning rate")

    def test(self, parts: Sequence[Rows]) -> tuple[float, float]:
        self.model.eval()
        found = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for part in parts[self.rank :: self.replicas]:
                with self._forward():
                    output = self.network(self.data.test_inputs[torch.from_numpy(part)])
                right = output.argmax(1) == self.data.test_labels[torch.from_numpy(part)]
                loss = self._loss(output, part, testing=True)
                found += torch.tensor([loss.item(), right.sum().item(), len(part)], dtype=torch.float64)
        if self.replicas > 1:
            torch.distributed.all_reduce(found)
        loss_sum, correct, count = found.tolist()
        return loss_sum / count, correct / count

    def snapshot(self) -> Snapshot:
        return torch_state.snapshot(self.network, self.optimizer, self.scaler, sharded=self.sharded)

    def restore(self, tensors: Mapping[str, Any], facts: Mapping[str, Any] | None) -> None:
        torch_state.restore(self.network, self.optimizer, self.scaler, tensors, facts, sharded=self.sharded)

    @property
    def sharded(self) -> bool:
        """Whether each replica holds a part of each parameter."""
        return self.replicas > 1 and self.config.runconfig.parallel is Parallel.FSDP2

    def close(self) -> None:
        self.world.leave()


class _Data:
    """Images and labels on the device, as precision wants them."""

    def __init__(self, config: Config, data: Dataset, device: torch.device) -> None:
        ready = prepare(data)
        train, test = (section.halved(config.kind) for section in (config.train_input, config.eval_input))
        self.train_inputs = _rounded(ready.train_inputs, train).to(device)
        self.test_inputs = _rounded(ready.test_inputs, test).to(device)
        self.train_labels, self.test_labels = ready.train_labels.to(device), ready.test_labels.to(device)


def _added_up(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Gradients summed over replicas, not averaged: each is of its share of the batch's mean loss, and so casts meet the same numbers."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


def _rounded(x: Tensor, half: bool) -> Tensor:
    return x.half().float() if half else x


def _seed(seed: int, step: int, rank: int) -> None:
    """Have the draws of an update depend on these alone, so that a resumed run repeats them."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state))


def loss_scaler(config: Config, device: torch.device, report: Callable[[str], None]) -> LossScaler | None:
    """The loss scale that the optimizer's section asks for."""
    options = config.optimizer
    if options.loss_scaling_factor == "dynamic":
        floor, first, ceiling = options.scale_bounds
        return LossScaler(
            device.type,
            start=first,
            floor=floor,
            ceiling=ceiling,
            growth_interval=options.growth_interval,
            report=report,
        )
    if options.loss_scaling_factor == 1.0:
        return None
    return LossScaler(device.type, start=options.loss_scaling_factor, dynamic=False, report=report)


@contextlib.contextmanager
def _first_bad(network: nn.Module) -> Iterator[list[str]]:
    """The names of the innermost modules whose output holds NaN or Inf, in the order they run inside the block."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    inner = [(name, module) for name, module in network.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in inner]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
