"""Logits of transformers in float64: the second opinion on families of models.

The package casts norms, rotary embeddings and routers to float32. Here these casts become casts to
float64, and inverse frequencies are computed in float64 and rounded to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def exact_logits(directory: Path, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the logits of all tokens of one sequence, `[tokens, vocabulary]`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    model = model.double().eval()
    with _float64(torch), torch.no_grad():
        for module in model.modules():
            if hasattr(module, "rope_type") and hasattr(module, "config"):
                _set_frequencies(module)
        found = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    logits: NDArray[np.float64] = found.numpy()
    return logits


@contextmanager
def _float64(torch: Any) -> Iterator[None]:
    """Let casts to float32 be casts to float64, and frequencies be rounded to float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    saved = torch.float32, torch.float, torch.Tensor.float
    functions = dict(ROPE_INIT_FUNCTIONS)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    ROPE_INIT_FUNCTIONS.update({kind: _rounded(f) for kind, f in functions.items()})
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved
        torch.set_default_dtype(torch.float32)
        ROPE_INIT_FUNCTIONS.update(functions)


def _rounded(compute: Callable[..., tuple[Any, float]]) -> Callable[..., tuple[Any, float]]:
    """Return a function like `compute`, whose frequencies are rounded to float32."""

    def rounded(*args: Any, **options: Any) -> tuple[Any, float]:
        import torch

        inverse, factor = compute(*args, **options)
        plain = inverse.double().numpy().astype(np.float32).astype(np.float64)
        return torch.from_numpy(plain), factor

    return rounded


def _set_frequencies(module: Any) -> None:
    """Compute a module's inverse frequencies again, in float64."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = module.rope_type
    for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        default = _rounded(module.compute_default_rope_parameters)
        compute = ROPE_INIT_FUNCTIONS.get(kind, default)
        inverse, _ = compute(module.config, **({} if layer is None else {"layer_type": layer}))
        prefix = "" if layer is None else f"{layer}_"
        for name in ("inv_freq", "original_inv_freq"):
            getattr(module, prefix + name).data = inverse
