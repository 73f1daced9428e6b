"""Frozen descriptions of a model and a dtype; `pympa.text.toml` reads them from files.

A `ModelSpec` is a list of `LayerSpec`s: all parameters of the mathematics of a transformer, and
nothing about how it is split.
"""

from pympa.spec.checks import (
    LEAST_FACTOR,
    LEAST_SOFTCAP,
    MOST_FACTOR,
    MOST_SIZE,
    MOST_SOFTCAP,
    SpecError,
    check_softcap,
)
from pympa.spec.dtypes import DTYPES, numpy_dtype
from pympa.spec.experts import GroupScore, Routing, ScoreKind
from pympa.spec.layer import Activation, Latent, LayerSpec, NormKind, NormOrder, QkNorm
from pympa.spec.model import MOST_LAYERS, ModelSpec
from pympa.spec.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

__all__ = [
    "DTYPES",
    "LEAST_FACTOR",
    "LEAST_SOFTCAP",
    "MOST_FACTOR",
    "MOST_LAYERS",
    "MOST_SIZE",
    "MOST_SOFTCAP",
    "Activation",
    "DynamicScaling",
    "GroupScore",
    "Latent",
    "LayerSpec",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ModelSpec",
    "NormKind",
    "NormOrder",
    "QkNorm",
    "Rope",
    "Routing",
    "Scaling",
    "ScoreKind",
    "SpecError",
    "YarnScaling",
    "check_softcap",
    "numpy_dtype",
]
