"""Time loading a model directory beside a plain read of its file into memory.

    mpirun -n N python bench/loading_against_read.py --plan tp=N [--rounds R] [--cold]

The directory is made first, in a temporary folder: a Llama of about 1 GB in bfloat16. Reads by one
rank (numpy.fromfile) and loads by all ranks alternate, so that both find the machine in the same
state. With --cold the file is dropped from the page cache before each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from pympa import Session
from pympa.checkpoint.families import describe
from pympa.model.weights import model_weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
    "attention.out": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}


def name_in_file(name: str) -> str:
    """Return the name of a tensor in the files of a Llama."""
    if name in NAMES:
        return NAMES[name]
    _, layer, rest = name.split(".", 2)
    kind, _, which = rest.partition(".")
    usual = {"attention": f"self_attn.{which}_proj.weight", "mlp": f"mlp.{which}_proj.weight"}
    return f"model.layers.{layer}.{NAMES.get(rest) or usual[kind]}"


def make_directory(folder: Path) -> Path:
    """Write a model directory with random weights, and return its file of weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02
    stored = numbers.astype(ml_dtypes.bfloat16)
    wanted = model_weights(describe(CONFIG, "config").spec)
    arrays = {name_in_file(n): np.resize(stored, weight.shape) for n, weight in wanted.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder / "model.safetensors"


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main() -> None:
    """Make the directory, and time reads and loads by turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", default="tp=1", help="the plan (tp=1)")
    parser.add_argument("--rounds", type=int, default=5, help="reads and loads (5)")
    parser.add_argument("--cold", action="store_true", help="read from the disk each time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as own, Session(options.plan) as session:
        path = make_directory(Path(own)) if session.rank == 0 else None
        path = Path(session.team.world.gather_objects(path)[0])
        size = path.stat().st_size

        def rate(work: Callable[[], None]) -> float:
            if options.cold and session.rank == 0:
                forget(path)
            session.team.barrier()
            start = time.perf_counter()
            work()
            session.team.barrier()
            return size / 1e9 / (time.perf_counter() - start)

        def read() -> None:
            if session.rank == 0:
                np.fromfile(path, np.uint8)

        def load() -> None:
            session.load(path.parent, progress=False).close()

        load()  # imports modules
        reads, loads = [], []
        for _ in range(options.rounds):
            reads.append(rate(read))
            loads.append(rate(load))
            if session.rank == 0:
                print(f"read {reads[-1]:.2f} GB/s, load {loads[-1]:.2f} GB/s", flush=True)
        if session.rank == 0:
            plain, ours = statistics.median(reads), statistics.median(loads)
            cache = "cold" if options.cold else "warm"
            print(
                f"{options.plan}, {size / 1e9:.2f} GB, page cache {cache}: "
                f"medians {plain:.2f} and {ours:.2f} GB/s, ratio {ours / plain:.2f}"
            )


if __name__ == "__main__":
    main()
