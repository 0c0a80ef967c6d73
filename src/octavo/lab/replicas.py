"""Replicas: processes that torchrun starts, restarts when one dies, and that train one network together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

__all__ = ["RESTARTS", "World", "end", "gone_replicas", "is_first", "is_replica", "launch", "restarts"]

RESTARTS = 3
"""How often torchrun starts the replicas anew after one has died."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process's place: its number among all replicas, theirs, and its device."""

    rank: int = 0
    replicas: int = 1
    device: torch.device

    @classmethod
    def join(cls, replicas: int) -> World:
        """Take the place that torchrun gave, over NCCL on GPUs and Gloo on CPUs; alone without torchrun.

        Raises ValueError where torchrun started another number of processes than the configuration says.
        """
        import torch

        there = int(os.environ.get("WORLD_SIZE", "1"))
        if there != replicas:
            raise ValueError(
                f"runconfig.num_replicas is {replicas}, and {there} processes were started; tell torchrun and the configuration the same"
            )
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if not is_replica():
            return cls(device=device)
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps one store over restarts, in which the addresses of processes that are gone still stand.
        own = PrefixStore(f"attempt/{restarts()}", store)
        backend = "nccl" if cuda else "gloo"
        torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=size)
        return cls(rank=rank, replicas=replicas, device=device)

    def leave(self) -> None:
        """Say good-bye to the others, once all are done."""
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def is_replica() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0" or not is_replica()


def restarts() -> int:
    """How often torchrun has restarted the replicas."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch(replicas: int, target: Sequence[str]) -> int:
    """Run `target`, a script with its arguments or `--module name ...`, in so many processes on this machine; the exit code.

    When one dies all are started anew, up to `RESTARTS` times.  Ctrl-C and SIGTERM reach every replica; the code is then 128 and the
    signal's number.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # As many threads in all as there are cores: more would slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // replicas)))
    # torchrun tells of every signal and every death; the replicas' own lines say enough.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    command = ["--standalone", f"--nproc-per-node={replicas}", f"--max-restarts={RESTARTS}", "--monitor-interval=0.2"]
    try:
        run.main([*command, *target])
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        codes = [int(failure.exitcode) for failure in error.failures.values()]
        code = next((code for code in codes if code), 1)
        return code if code > 0 else 128 - code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def end(code: int) -> NoReturn:
    """End a replica at once: Gloo's threads and the interpreter's last clean-up can wait for each other for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def gone_replicas() -> Iterator[None]:
    """Turn what a collective says of a replica that died into one line."""
    try:
        yield
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if not is_replica() or not ("gloo" in first or type(error).__name__.startswith("Dist")):
            raise
        raise ConnectionError(f"another replica is gone, and this one stops with it ({first})") from None
