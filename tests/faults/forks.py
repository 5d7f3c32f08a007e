"""Work in a forked child of a warm process: thousands of processes that die in earnest, a few milliseconds each."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a child ended: `signal` that killed it (0 for none); else its `value`, or the `error`'s class, message and exit code."""

    signal: int = 0
    value: Any = None
    error: str = ""
    message: str = ""
    exit_code: int = 0

    @property
    def killed(self) -> bool:
        return self.signal == signal.SIGKILL


def in_child(work: Callable[[], Any]) -> Ended:
    """Run `work` in a fork of this process, which must have one thread. The child runs no handler of ours when it ends."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            ended = Ended(value=work())
        except BaseException as error:  # reported to the parent, whatever it is
            ended = Ended(error=type(error).__name__, message=str(error), exit_code=getattr(error, "exit_code", 1))
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(ended, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return Ended(signal=os.WTERMSIG(status))
    return pickle.loads(content)


def die(*_: object) -> None:
    """SIGKILL to this process: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)
