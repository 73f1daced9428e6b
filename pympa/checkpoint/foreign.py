"""What packages raise about a user's file, as one refusal.

Parsers of others raise errors of many kinds, and code in Rust panics with an exception that
derives from BaseException, which a command line would show as a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pympa.errors import RefusedError
from pympa.text.escape import shown


@contextmanager
def refused(what: str, advice: str = "") -> Iterator[None]:
    """Turn every error inside the block into a RefusedError.

    Args:
        what: the subject and what was expected of it: `FILE: expected a safetensors file`.
        advice: what to do about it.

    Raises:
        RefusedError: something was raised inside; an interrupt and a RefusedError pass unchanged.
    """
    try:
        yield
    except (RefusedError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        tail = f"; {advice}" if advice else ""
        raise RefusedError(f"{what}; got: {shown(first)}{tail}") from None
