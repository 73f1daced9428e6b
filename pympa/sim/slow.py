"""`--slow rank=3,factor=2` and `--slow link=0-8,factor=4`: slower parts of a virtual cluster."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from pympa.sim.world import Slow

_FORM = re.compile(r"(?:rank=(\d+)|link=(\d+)-(\d+)),factor=([^,]+)", re.ASCII)


def parse_slow(texts: Sequence[str], ranks: int) -> Slow:
    """Return the slower parts.

    Args:
        texts: the options as on the command line. Kernels of the rank, or bytes between the two
            ranks in both directions, take `factor` times as long.
        ranks: the number of ranks of the cluster.

    Raises:
        ValueError: an option is not allowed; the message says what was given and what is allowed.
    """
    slow = Slow({}, {})
    for text in texts:
        parts = _FORM.fullmatch(text.replace(" ", ""))
        if parts is None:
            raise ValueError(
                f"--slow: expected rank=R,factor=F or link=A-B,factor=F, as in rank=3,factor=2; "
                f"got {text!r}"
            )
        factor = _factor(parts[4], text)
        named = [int(number) for number in parts.groups()[:3] if number is not None]
        if max(named) >= ranks or len(set(named)) != len(named):
            raise ValueError(
                f"--slow: expected ranks from 0 to {ranks - 1}, and two different ones for a link; "
                f"got {text!r}"
            )
        if len(named) == 1:
            slow.ranks[named[0]] = factor
        else:
            slow.links[min(named), max(named)] = factor
    if len(slow.ranks) + len(slow.links) < len(texts):
        raise ValueError(
            f"--slow: expected each rank and each link at most once; got {'; '.join(texts)}"
        )
    return slow


def _factor(number: str, text: str) -> float:
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(f"--slow: factor: expected a number above 0; got {text!r}")
    return factor
