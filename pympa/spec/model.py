"""A whole model: an embedding, blocks, a final norm, a head."""

from __future__ import annotations

import msgspec

from pympa.spec.checks import MOST_EXPERTS, SpecError, check_positive, check_softcap
from pympa.spec.layer import LayerSpec

MOST_LAYERS = 10_000


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder: embedding, blocks, final norm, head.

    Attributes:
        d_model: the width of the residual stream; independent of heads * head_dim.
        vocabulary: the number of rows of the embedding and of the head.
        layers: the blocks in order; an entry with `repeat` represents several.
        causal: whether a token attends only to itself and earlier tokens.
        tied_head: whether the head reuses the embedding.
        embedding_scale: the number by which embeddings are multiplied, rounded to the dtype.
        logit_softcap: the cap in cap * tanh(logit / cap); None means no cap.
        context: the declared number of tokens of the longest sequence, with those still to be
            generated, by which dynamic and longrope embeddings are chosen; None means the longest
            sequence of a batch.
    """

    d_model: int
    vocabulary: int
    layers: tuple[LayerSpec, ...]
    causal: bool = True
    tied_head: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "d_model", "vocabulary", "embedding_scale", "context")
        check_softcap(self.logit_softcap, "logit_softcap")
        if not self.layers:
            raise SpecError("layers: expected at least one layer; got none")
        layers = sum(layer.repeat for layer in self.layers)
        if layers > MOST_LAYERS:
            raise SpecError(f"layers: expected at most {MOST_LAYERS:,} of them; got {layers:,}")
        experts = sum(layer.repeat * layer.experts for layer in self.layers)
        if experts > 16 * MOST_EXPERTS:
            raise SpecError(
                f"layers: expected at most {16 * MOST_EXPERTS:,} experts in all of them; "
                f"got {experts:,}"
            )

    @property
    def blocks(self) -> tuple[LayerSpec, ...]:
        """The blocks one by one, with `repeat` unrolled."""
        return tuple(layer for layer in self.layers for _ in range(layer.repeat))

    @property
    def has_experts(self) -> bool:
        """Whether some layer has experts."""
        return any(layer.experts for layer in self.layers)

    @property
    def depends_on_context(self) -> bool:
        """Whether some layer's rotary embedding depends on the declared context."""
        return any(
            layer.rope is not None and layer.rope.depends_on_context for layer in self.layers
        )

    def within(self, context: int) -> ModelSpec:
        """Return the model for sequences of up to `context` tokens.

        Raises:
            SpecError: the declared context is shorter, and an embedding depends on it.
        """
        if not self.depends_on_context:
            return self
        if self.context is None:
            return msgspec.structs.replace(self, context=context)
        if self.context < context:
            raise SpecError(
                f"context: expected at least {context:,}, the tokens of the longest sequence; "
                f"got {self.context:,}"
            )
        return self
