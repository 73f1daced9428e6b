"""pympa: exact multi-rank inference of long-context transformers over MPI.

Importing this package starts neither MPI nor a GPU; `pympa.session.Session` does.
"""

from importlib.metadata import version
from pkgutil import extend_path

# In a checkout this folder hides the installed package, which alone has the compiled core.
__path__ = extend_path(__path__, __name__)

__version__ = version("pympa")
