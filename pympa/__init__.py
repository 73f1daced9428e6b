"""pympa: exact multi-rank inference of long-context transformers over MPI.

Importing this package starts neither MPI nor a GPU; `pympa.session.Session` does.
"""

from importlib.metadata import version

__version__ = version("pympa")
