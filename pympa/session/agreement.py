"""Checks that all ranks pass before they work: equal arguments, and no error on any rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pympa.errors import RefusedError
from pympa.transport import Transport

T = TypeVar("T")


def check_same(what: str, values: Sequence[Any]) -> None:
    """Refuse values that differ between ranks.

    Args:
        what: the name of the value, for the message.
        values: the value of each rank.

    Raises:
        RefusedError: a rank differs; the message names the first one that differs from rank 0.
    """
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise RefusedError(
            f"{what}: expected the same on all ranks; rank 0 has {values[0]!r}, "
            f"rank {others[0]} has {values[others[0]]!r}"
        )


def check_all(world: Transport, local: Callable[[], T]) -> T:
    """Run a check on every rank and continue only if none fails. Collective.

    Args:
        world: the transport between the ranks.
        local: a function that raises ValueError or OSError if the check fails.

    Raises:
        RefusedError: a check failed, on all ranks with the first message.
    """
    result: T | None = None
    objection = None
    try:
        result = local()
    except (ValueError, OSError) as error:
        objection = str(error)
    for text in world.gather_objects(objection):
        if text is not None:
            raise RefusedError(text)
    return result  # type: ignore[return-value]
