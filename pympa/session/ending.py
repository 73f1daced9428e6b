"""The early end of a job: one message, whichever ranks fail."""

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
from pympa.text.escape import shown
from pympa.transport.endpoint import TransportError

_ONE_LINE_ERRORS = (ValueError, OSError, TransportError, MemoryError)
ExceptHook = Callable[[type[BaseException], BaseException, Any], Any]
_STAGGER_SECONDS = 0.1  # between ranks that fail together; the first one ends the job
_LONGEST_STAGGER_SECONDS = 2.0
_INTERRUPTED_SECONDS = 2.0  # a launcher sends Ctrl-C to all ranks, and rank 0 prints the message
_LOST_SECONDS = 1.0  # a message may fail because a rank has ended that printed its own message
_FORWARD_SECONDS = 0.05  # the time in which a launcher forwards a line


def end_job(rank: int, error: BaseException, abort: Callable[[int], None]) -> NoReturn:
    """Print one message and end all ranks of the job.

    Args:
        rank: the number of this rank in the world.
        error: the error on this rank.
        abort: a function that ends all ranks with a status.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # no second interrupt
    if isinstance(error, TransportError):
        time.sleep(_LOST_SECONDS)
    if rank and isinstance(error, KeyboardInterrupt):
        time.sleep(_INTERRUPTED_SECONDS)
    time.sleep(min(_STAGGER_SECONDS * rank, _LONGEST_STAGGER_SECONDS))
    _print_error(rank, error)
    _wait_until_read()
    abort(1)
    os._exit(1)  # some libraries return from Abort; nothing may be printed twice


def refuse_once(rank: int, hook: ExceptHook) -> ExceptHook:
    """Return an excepthook for refusals, which all ranks raise: only rank 0 prints the message."""

    def refuse(kind: type[BaseException], error: BaseException, where: Any) -> None:
        if not isinstance(error, RefusedError):
            hook(kind, error, where)
        elif rank == 0:
            print(f"pympa: {shown(str(error))}", file=sys.stderr, flush=True)

    return refuse


def _print_error(rank: int, error: BaseException) -> None:
    """Print one message; with a traceback if the error is unexpected."""
    if isinstance(error, SystemExit):
        text = f"called sys.exit({error.code!r}) while other ranks may wait for it"
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, _ONE_LINE_ERRORS):
        text = shown(f"{type(error).__name__}: {error}")
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    print(f"pympa: rank {rank}: {text}", file=sys.stderr, flush=True)


def _wait_until_read() -> None:
    """Wait until the launcher has read standard error: an abort would lose unread lines."""
    deadline = time.monotonic() + 10 * _FORWARD_SECONDS
    unread = bytearray(4)
    try:
        while time.monotonic() < deadline:
            fcntl.ioctl(sys.stderr.fileno(), termios.FIONREAD, unread)
            if not any(unread):
                break
            time.sleep(_FORWARD_SECONDS / 10)
    except (OSError, ValueError):
        return  # neither a pipe nor a terminal
    time.sleep(_FORWARD_SECONDS)
