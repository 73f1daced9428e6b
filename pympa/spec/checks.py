"""Limits of the numbers of a description, and the refusal of what is beyond them."""

from __future__ import annotations

import msgspec

MOST_SIZE, MOST_FACTOR = 1 << 30, 1e30
"""The largest numbers of a model, whole and other: more is a typing error, or overflows float32."""
MOST_EXPERTS = 1 << 16
"""The most experts of a layer, and a 16th of those of all layers: each has tensors of its own."""
MOST_RANKED_EXPERTS = 2048
"""The most experts of a layer whose choice is more than the largest logits."""
LEAST_FACTOR = 2.0**-126
"""The smallest normal float32 number: kernels round smaller ones, or treat them as 0."""
LEAST_SOFTCAP, MOST_SOFTCAP = LEAST_FACTOR, 1e5
"""The range of a cap on scores: below, float32 does not hold its reciprocal; above, it changes no
score below 40, so it is a typing error."""


class SpecError(ValueError):
    """A description that the mathematics or this version does not allow."""


def check_softcap(softcap: float | None, name: str = "softcap") -> None:
    """Refuse a cap on scores that float32 does not hold, or that has no effect.

    Raises:
        SpecError: the cap is neither None nor from `LEAST_SOFTCAP` to `MOST_SOFTCAP`.
    """
    if softcap is not None and not LEAST_SOFTCAP <= softcap <= MOST_SOFTCAP:
        raise SpecError(
            f"{name}: expected a number from {LEAST_SOFTCAP:.3g} to {MOST_SOFTCAP:g}, or None for "
            f"no cap; got {softcap:g}"
        )


def check_positive(spec: msgspec.Struct, *fields: str, where: str = "") -> None:
    """Refuse numbers that are not positive, or too large; None and empty lists are allowed.

    Args:
        spec: the description.
        fields: the names of its fields, which are numbers or tuples of numbers.
        where: the path of the description, as in "rope.", for the message.

    Raises:
        SpecError: a number is not allowed; the message names its field.
    """
    for field in fields:
        value = getattr(spec, field)
        for number in value if isinstance(value, tuple) else (value,):
            most = MOST_SIZE if isinstance(number, int) else MOST_FACTOR
            if number is not None and not number > 0:
                raise SpecError(f"{where}{field}: expected a positive number; got {number}")
            if isinstance(number, float) and number < LEAST_FACTOR:
                raise SpecError(
                    f"{where}{field}: expected at least {LEAST_FACTOR:.3g}, the least float32 "
                    f"number; got {number:g}"
                )
            if number is not None and number > most:
                raise SpecError(f"{where}{field}: expected at most {most:g}; got {number:g}")


def check_eps(eps: float, name: str) -> None:
    """Refuse an epsilon of a norm that float32 does not hold.

    Raises:
        SpecError: it is neither 0 nor a normal float32 number.
    """
    if eps and not LEAST_FACTOR <= eps <= MOST_FACTOR:
        raise SpecError(
            f"{name}: expected 0 or a number from {LEAST_FACTOR:.3g} to {MOST_FACTOR:g}; "
            f"got {eps:g}"
        )
