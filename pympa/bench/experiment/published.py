"""The sizes of its model that a paper prints."""

from __future__ import annotations

import msgspec


class PublishedFootprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes as printed, in elements, tokens and bytes; None where the paper prints none.

    Attributes:
        parameters: the number of parameters of the model.
        weight_bytes: the bytes of the model's weights.
        layer_weight_bytes: the bytes of one layer's weights.
        activation_bytes: the bytes of the residual stream of the whole batch.
        chunk_tokens: the number of tokens of each sequence that go through a layer at a time.
        chunk_bytes: the bytes of the residual stream of such a chunk.
        weight_tile_bytes: the bytes of weights in a layer's working set.
        operator_buffer_bytes: the bytes of buffers in a layer's working set.
        intermediate_state_bytes: the bytes of state between operators in a layer's working set.
        working_set_bytes: the bytes of a layer's working set.
        cache_use_bytes: the bytes of the cache that a layer's step occupies.
    """

    parameters: float | None = None
    weight_bytes: float | None = None
    layer_weight_bytes: float | None = None
    activation_bytes: float | None = None
    chunk_tokens: int | None = None
    chunk_bytes: float | None = None
    weight_tile_bytes: float | None = None
    operator_buffer_bytes: float | None = None
    intermediate_state_bytes: float | None = None
    working_set_bytes: float | None = None
    cache_use_bytes: float | None = None
