"""How a job ends early: one message, on whichever ranks something went wrong."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from pympa.errors import RefusedError
from pympa.text import shown
from pympa.transport import TransportError

_TOLD_IN_A_LINE = (ValueError, OSError, TransportError, MemoryError)
ExceptHook = Callable[[type[BaseException], BaseException, Any], Any]
_STAGGER_SECONDS = 0.1  # ranks that fail together speak in turn; the first one ends the job
_LONGEST_STAGGER_SECONDS = 2.0
_INTERRUPTED_SECONDS = 2.0  # a launcher hands Ctrl-C to all ranks, and rank 0 speaks for them
_LOST_SECONDS = 1.0  # a message that fails may be the echo of a rank whose end has been told
_FORWARD_SECONDS = 0.05  # what a launcher takes to pass on a line that it has read


def end_job(rank: int, error: BaseException, abort: Callable[[int], None]) -> NoReturn:
    """Print one message and end all ranks of the job.

    Args:
        rank: of the world.
        error: what went wrong on it.
        abort: ends all ranks with a status.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # once is enough
    if isinstance(error, TransportError):
        time.sleep(_LOST_SECONDS)
    if rank and isinstance(error, KeyboardInterrupt):
        time.sleep(_INTERRUPTED_SECONDS)
    time.sleep(min(_STAGGER_SECONDS * rank, _LONGEST_STAGGER_SECONDS))
    _tell(rank, error)
    _wait_until_read()
    abort(1)
    os._exit(1)  # some libraries return from Abort; nothing may be printed twice


def one_voice(rank: int, hook: ExceptHook) -> ExceptHook:
    """Return an excepthook for refusals, which all ranks raise: rank 0 prints one line."""

    def refuse(kind: type[BaseException], error: BaseException, where: Any) -> None:
        if not isinstance(error, RefusedError):
            hook(kind, error, where)
        elif rank == 0:
            print(f"pympa: {shown(str(error))}", file=sys.stderr, flush=True)

    return refuse


def _tell(rank: int, error: BaseException) -> None:
    """Print one message; a traceback only where the message alone would not tell."""
    if isinstance(error, SystemExit):
        text = f"left early by sys.exit({error.code!r}) while other ranks may wait for it"
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, _TOLD_IN_A_LINE):
        text = shown(f"{type(error).__name__}: {error}")
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    print(f"pympa: rank {rank}: {text}", file=sys.stderr, flush=True)


def _wait_until_read() -> None:
    """Give the launcher time to read standard error: an abort would lose what it has not read."""
    deadline = time.monotonic() + 10 * _FORWARD_SECONDS
    unread = bytearray(4)
    try:
        while time.monotonic() < deadline:
            fcntl.ioctl(sys.stderr.fileno(), termios.FIONREAD, unread)
            if not any(unread):
                break
            time.sleep(_FORWARD_SECONDS / 10)
    except (OSError, ValueError):
        return  # neither a pipe nor a terminal: nobody has to read it
    time.sleep(_FORWARD_SECONDS)
