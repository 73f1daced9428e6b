"""Rotary position embeddings, and the ways to stretch them over longer texts than in training.

A head's dimensions rotate in pairs; pair i turns by position times its frequency, theta^(-2i/dim)
before scaling (Su et al. 2021, arXiv 2104.09864).
"""

from __future__ import annotations

import msgspec

from pympa.spec.checks import SpecError, check_positive


class _Scaling(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"
):
    """The base of the ways to stretch."""


class LinearScaling(_Scaling, frozen=True, tag="linear"):
    """All frequencies are divided by one number (Chen et al. 2023, arXiv 2306.15595).

    Attributes:
        factor: that number.
    """

    factor: float

    def __post_init__(self) -> None:
        check_positive(self, "factor", where="rope.scaling.")


class DynamicScaling(_Scaling, frozen=True, tag="dynamic"):
    """theta grows with the context, if it is longer than the trained one ("dynamic NTK").

    theta is multiplied by (factor · context / trained - (factor - 1))^(dim / (dim - 2)).

    Attributes:
        factor: the factor in the formula.
        trained_context: the number of tokens up to which theta stays as it is.
    """

    factor: float
    trained_context: int

    def __post_init__(self) -> None:
        check_positive(self, "factor", "trained_context", where="rope.scaling.")
        if self.factor < 1.0:
            raise SpecError(f"rope.scaling.factor: expected at least 1; got {self.factor:g}")


class Llama3Scaling(_Scaling, frozen=True, tag="llama3"):
    """Low frequencies are divided, high ones are not, between them a blend (Llama 3.1).

    A pair whose wavelength is above trained_context / low_frequency_factor is divided by `factor`,
    one below trained_context / high_frequency_factor is not.

    Attributes:
        factor: the divisor of low frequencies.
        trained_context: the number of tokens of a text in training.
        low_frequency_factor: see above.
        high_frequency_factor: see above; larger than the low one.
    """

    factor: float
    trained_context: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        check_positive(self, *self.__struct_fields__, where="rope.scaling.")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise SpecError(
                "rope.scaling.high_frequency_factor: expected more than low_frequency_factor="
                f"{self.low_frequency_factor:g}; got {self.high_frequency_factor:g}"
            )


class YarnScaling(_Scaling, frozen=True, tag="yarn"):
    """Pairs that turn seldom in training are divided, others are not (Peng et al. 2023).

    arXiv 2309.00071. Pairs with less than `beta_slow` turns in `trained_context` tokens are divided
    by `factor`, those with more than `beta_fast` are not, between them there is a linear ramp.

    Attributes:
        factor: the divisor.
        trained_context: the number of tokens of a text in training.
        beta_fast: see above.
        beta_slow: see above.
        truncate: whether the ends of the ramp are whole numbers of pairs.
        attention_factor: the number by which q and k are multiplied; None means 0.1·ln(factor) + 1,
            or 1 if the factor is below 1.
    """

    factor: float
    trained_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        fields = ("factor", "trained_context", "beta_fast", "beta_slow", "attention_factor")
        check_positive(self, *fields, where="rope.scaling.")


class LongRopeScaling(_Scaling, frozen=True, tag="longrope"):
    """Each pair has a divisor of its own, one for short and one for long contexts.

    Ding et al. 2024 (arXiv 2402.13753). The context is long if it is above `trained_context`.

    Attributes:
        short: the divisor of each pair in short contexts.
        long: the divisor of each pair in long contexts.
        trained_context: the number of tokens of a text in training.
        factor: the longest context over the trained one, for the attention factor.
        attention_factor: the number by which q and k are multiplied; None means
            √(1 + ln(factor) / ln(trained_context)), or 1 if the factor is at most 1.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained_context: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, *self.__struct_fields__, where="rope.scaling.")
        if self.trained_context < 2:
            raise SpecError(
                f"rope.scaling.trained_context: expected at least 2; got {self.trained_context}"
            )
        if len(self.short) != len(self.long):
            raise SpecError(
                "rope.scaling.short, long: expected as many numbers; "
                f"got {len(self.short)} and {len(self.long)}"
            )


Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A rotary position embedding.

    Attributes:
        theta: the base of the geometric sequence of frequencies.
        rotated_dim: the number of dimensions of a head that rotate; None means all of them.
        trailing: whether these are the last dimensions of a head, instead of the first.
        interleaved: whether pairs are neighbours (2i, 2i + 1), instead of (i, i + rotated_dim / 2).
        scaling: the way to stretch it over long contexts; None means none.
    """

    theta: float = 10000.0
    rotated_dim: int | None = None
    trailing: bool = False
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        check_positive(self, "theta", "rotated_dim", where="rope.")

    @property
    def depends_on_context(self) -> bool:
        """Whether frequencies depend on the declared context of the model."""
        scaling = self.scaling
        if isinstance(scaling, LongRopeScaling):
            return scaling.short != scaling.long
        return isinstance(scaling, DynamicScaling)

    def check(self, head_dim: int) -> None:
        """Refuse an embedding that does not fit a head.

        Raises:
            SpecError: the number of rotated dimensions is odd or too large, or a scaling has not
                one divisor for each pair.
        """
        rotated = self.rotated(head_dim)
        if rotated % 2 or rotated > head_dim:
            raise SpecError(
                f"rope.rotated_dim: expected an even number in 2..{head_dim} "
                f"(head_dim); got {rotated}"
            )
        scaling = self.scaling
        if isinstance(scaling, LongRopeScaling) and len(scaling.short) != rotated // 2:
            raise SpecError(
                f"rope.scaling.short: expected {rotated // 2} numbers, one for each pair; "
                f"got {len(scaling.short)}"
            )
        if isinstance(scaling, DynamicScaling) and rotated == 2:
            raise SpecError("rope.scaling: dynamic: expected at least 2 pairs; got rotated_dim=2")
        if isinstance(scaling, YarnScaling) and self.theta <= 1.0:
            raise SpecError(f"rope.theta: expected more than 1 with yarn; got {self.theta:g}")

    def rotated(self, head_dim: int) -> int:
        """Return the number of dimensions of a head that rotate."""
        return head_dim if self.rotated_dim is None else self.rotated_dim
