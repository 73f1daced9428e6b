"""pympa: exact multi-rank inference of long-context transformers over MPI.

Importing this package starts neither MPI nor a GPU; `pympa.session.Session` does.
"""

import sys
from pkgutil import extend_path

_words = sys.orig_argv
if sys.argv[:1] == ["-m"] and any(
    word.removeprefix("-m").partition(".")[0] == __name__ for word in _words[1:]
):
    # Python is on its way to a command line of ours: see command.command_line.
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

# In a checkout this folder hides the installed package, which alone has the compiled core.
__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # costs 40 ms, which every rank would pay

        return version("pympa")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
