"""The dtypes of weights and activations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from pympa.spec.checks import SpecError

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype with the name `name`.

    Raises:
        SpecError: `name` is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise SpecError(f"dtype: expected one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]
