"""How tokens choose experts."""

from __future__ import annotations

from typing import Literal

import msgspec

from pympa.spec.checks import MOST_RANKED_EXPERTS, SpecError, check_positive

ScoreKind = Literal["softmax", "sigmoid"]
GroupScore = Literal["largest", "top2"]


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The choice of experts by their logits, and the weights of the chosen ones.

    Experts are chosen by score plus choice bias; ties go to the lower id. With groups, a token
    chooses among the experts of its best groups only (DeepSeek-V2, arXiv 2405.04434, and V3,
    arXiv 2412.19437).

    Attributes:
        score: the function from logits to scores: "softmax" over all experts, or "sigmoid".
        bias: whether the logits have a bias.
        choice_bias: whether a float32 bias is added to scores for the choice alone, not for the
            weights.
        groups: the number of groups of consecutive experts.
        top_groups: the number of groups that a token chooses from; None means all.
        group_score: the score of a group: its "largest" score, or the sum of its two largest,
            "top2", with the choice bias.
        scale: the number by which the weights of chosen experts are multiplied.
    """

    score: ScoreKind = "softmax"
    bias: bool = False
    choice_bias: bool = False
    groups: int = 1
    top_groups: int | None = None
    group_score: GroupScore = "largest"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "groups", "top_groups", "scale", where="routing.")
        if self.top_groups is not None and self.top_groups > self.groups:
            raise SpecError(
                f"routing.top_groups: expected at most {self.groups} (groups); "
                f"got {self.top_groups}"
            )

    @property
    def chosen_groups(self) -> int:
        """The number of groups that a token chooses from."""
        return self.groups if self.top_groups is None else self.top_groups

    @property
    def by_logits(self) -> bool:
        """Whether experts are chosen by their logits: a softmax without bias keeps their order."""
        return self.score == "softmax" and not self.choice_bias and self.group_score == "largest"

    def check(self, experts: int, top_k: int) -> None:
        """Refuse groups that do not fit the experts.

        Raises:
            SpecError: the groups are unequal or too small, or there are too many experts.
        """
        is_plain = self.by_logits and self.chosen_groups == self.groups
        if not is_plain and experts > MOST_RANKED_EXPERTS:
            raise SpecError(
                f"experts: expected at most {MOST_RANKED_EXPERTS:,} with this routing; "
                f"got {experts:,}"
            )
        if experts % self.groups:
            raise SpecError(
                f"routing.groups: expected a divisor of {experts} (experts); got {self.groups}"
            )
        size = experts // self.groups
        if self.group_score == "top2" and size < 2:
            raise SpecError(
                f"routing.group_score: top2: expected groups of at least 2 experts; got {size}"
            )
        if top_k > size * self.chosen_groups:
            raise SpecError(
                f"top_k: expected at most {size * self.chosen_groups}, the experts of "
                f"{self.chosen_groups} groups; got {top_k}"
            )
