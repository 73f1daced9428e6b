"""Time a whole model on one rank beside the same model in torch eager, after checking both.

    python bench/model_against_torch.py [EXPERIMENT] [--size local] [--dtype D] [--threads T]

Both get the same weights, tokens and threads, and their runs alternate. Each is first checked
against the float64 oracle: torch rounds at other points, so each has its own error, within the same
tolerance.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pympa.bench.experiment.description import load_experiment
from pympa.bench.experiment.input import load_ids
from pympa.kernels.cpu import supported_isas
from pympa.kernels.peaks import measure_core
from pympa.model.model import Model
from pympa.model.random_weights import random_weights
from pympa.model.weights import full_weight, model_weights
from pympa.plan.accounting import step_flops
from pympa.plan.mesh import Plan
from pympa.session.resources import build_resources
from pympa.spec import LayerSpec, ModelSpec, numpy_dtype
from pympa.transport.endpoint import NullEndpoint
from pympa.verify.contract import TOLERANCE
from pympa.verify.oracle import oracle


class TorchModel:
    """The usual model in torch: linears, scaled_dot_product_attention, GELU."""

    def __init__(self, spec: ModelSpec, dtype: np.dtype[Any]) -> None:
        self.spec = spec
        self.dtype = getattr(torch, dtype.name)
        source = random_weights(spec)
        self.weights = {
            name: torch.from_numpy(full_weight(source, w, dtype)).to(self.dtype)
            for name, w in model_weights(spec).items()
        }

    def forward(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        """Return the last residual stream of all sequences `[tokens, d_model]`."""
        return torch.cat([self._sequence(ids) for ids in sequences])

    def _sequence(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.weights["embedding"][ids]
        for index, layer in enumerate(self.spec.blocks):
            x = x + self._attention(f"layers.{index}.", layer, x)
            hidden = self._norm(f"layers.{index}.mlp_norm", layer, x)
            hidden = functional.linear(hidden, self.weights[f"layers.{index}.mlp.up"])
            hidden = functional.gelu(hidden, approximate="tanh")
            x = x + functional.linear(hidden, self.weights[f"layers.{index}.mlp.down"])
        return x

    def _attention(self, at: str, layer: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        normed = self._norm(at + "attention_norm", layer, x)
        q, k, v = (
            functional.linear(normed, self.weights[f"{at}attention.{n}"])
            .view(len(x), -1, layer.head_dim)
            .transpose(0, 1)
            for n in "qkv"
        )
        q, k = self._rope(layer, q), self._rope(layer, k)
        o = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        return functional.linear(
            o.transpose(0, 1).reshape(len(x), -1), self.weights[at + "attention.out"]
        )

    def _norm(self, name: str, layer: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], layer.norm_eps)

    def _rope(self, layer: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        half = layer.head_dim // 2
        frequency = layer.rope.theta ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[1])[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        a, b = x[..., :half].float(), x[..., half:].float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def main() -> None:
    """Check both models, time them and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="?", default="ring-dense")
    parser.add_argument("--size", default="local")
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=9)
    options = parser.parse_args()
    experiment = load_experiment(options.experiment)
    size = experiment.size(options.size, options.experiment)
    dtype = numpy_dtype(options.dtype or experiment.dtype)
    spec, ids, isa = size.model, load_ids(None, size), supported_isas()[0]
    torch.set_num_threads(options.threads)
    rank = build_resources(NullEndpoint(0, 1), Plan(), isa=isa, threads=options.threads)
    model = Model(spec, rank, dtype)
    prepared = model.prepare(ids)
    peer = TorchModel(spec, dtype)
    tokens = [torch.from_numpy(sequence.astype(np.int64)) for sequence in ids]
    outputs: dict[str, Any] = {}
    with torch.inference_mode():
        ours = _outputs_of(model, prepared)
        outputs["pympa"], outputs["torch"] = ours, peer.forward(tokens).double().numpy()
        truth = oracle(spec, dtype, random_weights(spec), ids)["output"]
        limit = TOLERANCE[dtype.name] * len(spec.blocks) ** 0.5
        for name, output in outputs.items():
            error = np.linalg.norm(output - truth) / np.linalg.norm(truth)
            print(f"{name}: error {error:.2e}, tolerance {limit:.2e}")
            if not error <= limit:
                raise SystemExit(
                    f"{name}: error: expected at most {limit:.2e}; got {error:.2e}; not timed"
                )
        runs: dict[str, Callable[[], Any]] = {
            "pympa": lambda: model.forward(prepared),
            "torch": lambda: peer.forward(tokens),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.iterations):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    flops = step_flops(spec, size.lengths)
    peak = measure_core(dtype.name, isa).flops_per_second * options.threads
    for name, values in seconds.items():
        typical = statistics.median(values)
        print(
            f"{name}: {1e3 * typical:.1f} ms (from {1e3 * min(values):.1f} to "
            f"{1e3 * max(values):.1f}), {sum(size.lengths) / typical:,.0f} tokens/s, "
            f"{flops / typical / 1e9:.0f} GFLOP/s, {flops / typical / peak:.0%} of the peak"
        )
    ratio = statistics.median(seconds["torch"]) / statistics.median(seconds["pympa"])
    print(f"{options.experiment} ({options.size}, {dtype.name}): {ratio:.2f} x torch")


def _outputs_of(model: Model, prepared: Any) -> np.ndarray[Any, Any]:
    seen: list[np.ndarray[Any, Any]] = []

    def probe(name: str, array: np.ndarray[Any, Any], layout: object) -> None:
        if name == "output":
            seen.append(array.astype(np.float64))

    model.forward(prepared, probe)
    return np.concatenate(seen)


if __name__ == "__main__":
    main()
