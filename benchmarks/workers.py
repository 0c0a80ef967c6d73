"""Contenders in processes of their own, told what to run over a pipe: the thread pools of two libraries in one process get in each
other's way.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Gone", "Worker", "serve"]

SETTLE = 0.05
"""Seconds between two contenders, in which the threads of the one before stop looking for work."""


class Gone(RuntimeError):
    """A contender that cannot run here; the message says why."""


class Worker:
    """`python script --worker name`, on so many processors; it answers questions one at a time, by `serve`."""

    def __init__(self, script: str, name: str, threads: int, *arguments: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", name, "--threads", str(threads), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={threads}",
                "TORCH_LOGS": "-dynamo",  # errors alone
            },
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer.  Raises Gone where it failed."""
        time.sleep(SETTLE)
        self.tell(**question)
        return self.hear()

    def tell(self, **question: Any) -> None:
        """Put a question, and do not wait."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `hear` says so
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The answer to the question that was put.  Raises Gone where there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line or '{"error": "its process ended"}')
        if "error" in answer:
            raise Gone(f"{self.name} is left out: {answer['error']}")
        return answer

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.communicate()


def serve(threads: int, prepare: Callable[[], Callable[..., dict[str, Any]]]) -> None:
    """In a worker: prepare, then answer each question by what came of it, until there are no more."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    answer = None
    for line in sys.stdin:
        try:
            answer = answer or prepare()
            found = answer(**json.loads(line))
        except Exception as error:  # it reaches the reader as the reason why a row is missing
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(found), file=answers, flush=True)
