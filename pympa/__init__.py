"""pympa: exact multi-rank inference of long-context transformers over MPI.

Importing this package starts neither MPI nor a GPU; `pympa.session.Session` does.
"""

import sys

if sys.argv[:1] == ["-m"]:  # Python looks for a command line of ours: see command.command_line
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

from pkgutil import extend_path

# In a checkout this folder hides the installed package, which alone has the compiled core.
__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # costs 40 ms, which every rank would pay

        return version("pympa")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
