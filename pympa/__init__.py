"""pympa: exact multi-rank inference of long-context transformers over MPI.

Importing this package starts neither MPI nor a GPU; entering a `pympa.Session` does.
"""

from __future__ import annotations

import importlib
import sys
from pkgutil import extend_path
from typing import Any

_words = sys.orig_argv
if sys.argv[:1] == ["-m"] and any(
    word.removeprefix("-m").partition(".")[0] == __name__ for word in _words[1:]
):
    # Python is starting one of our command lines: see command.line.command_line.
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

# In a checkout, this folder hides the installed package, which has the only compiled core.
__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> Any:
    # Loaded on first use: otherwise every rank of every command line would import them.
    if name == "Session":
        return importlib.import_module("pympa.session.session").Session
    if name == "__version__":
        from importlib.metadata import version

        return version("pympa")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
