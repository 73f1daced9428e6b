"""Which files of a model directory hold its weights; no file outside the directory is read.

A directory that someone else made may hold names such as `../../secret`, or symbolic links that
lead away. A member of a directory is therefore a plain name, and what it leads to must lie in the
directory itself. One arrangement of links is usual: the cache of Hugging Face keeps files under
`models--X/blobs` and links to them from `models--X/snapshots/REVISION`. If the directory is such a
snapshot, its own `blobs` belong to it. The path that a user names may be a link to anywhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pympa.errors import RefusedError
from pympa.text.escape import shown

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MOST_SHOWN = 3  # names of files in a message


@dataclass(frozen=True)
class ModelFiles:
    """Where the weights of a model are.

    Attributes:
        directory: the directory of the files.
        kind: the format of the weights.
        weights: the file with the weights, the first part of them, or their index.
    """

    directory: Path
    kind: Literal["safetensors", "index", "gguf"]
    weights: Path


def find_model(path: str | Path) -> ModelFiles:
    """Find the weights that a path names.

    In a directory, `model.safetensors` comes first, then `model.safetensors.index.json`, as for
    transformers; then the only safetensors file, then the only GGUF file or the first part of one.

    Args:
        path: a directory, a safetensors file, an index of shards, or a GGUF file.

    Raises:
        RefusedError: there are no weights, more than one candidate, or only pickles.
    """
    path = Path(path)
    try:
        if path.is_dir():
            directory = Path(os.path.realpath(path))
            return _in_directory(directory, sorted(os.listdir(directory)))
        exists = path.exists()
    except RefusedError:
        raise
    except (OSError, ValueError) as error:
        raise RefusedError(f"{shown(str(path))}: {shown(str(error))}") from None
    if not exists:
        raise RefusedError(
            f"{shown(str(path))}: expected a model directory or a file; got a path that does not "
            "exist; download a model with: hf download ORGANISATION/NAME --local-dir DIRECTORY"
        )
    if path.suffix == ".safetensors":
        return ModelFiles(path.parent, "safetensors", path)
    if path.name == INDEX:
        return ModelFiles(path.parent, "index", path)
    if path.suffix == ".gguf":
        return ModelFiles(path.parent, "gguf", path)
    if path.suffix in _PICKLES:
        raise _pickled(path.parent, [path.name])
    raise RefusedError(
        f"{shown(str(path))}: expected a model directory, a .safetensors or a .gguf file; got "
        "another file"
    )


def member(directory: Path, name: str) -> Path:
    """Return the path of a file in a model directory, which need not exist.

    Args:
        directory: the directory.
        name: the name of the file, without directories.

    Returns:
        The path in the directory, itself without links.

    Raises:
        RefusedError: the name has directories, or is a link out of the directory.
    """
    where = f"{shown(str(directory))}: file {shown(repr(name))}"
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise RefusedError(f"{where}: expected a plain file name in the model directory")
    try:
        own = os.path.realpath(directory)
        target = os.path.realpath(os.path.join(own, name))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{where}: {shown(str(error))}") from None
    roots = [own]
    if os.path.basename(os.path.dirname(own)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(own)), "blobs"))
    if not any(target.startswith(root + os.sep) for root in roots):
        raise RefusedError(
            f"{where}: expected a file in this directory; got a link to {shown(target)}; copy what "
            "it links to into the directory, as cp -L does"
        )
    return Path(own, name)


def optional_member(directory: Path, name: str) -> Path | None:
    """Return the path of a file in a model directory, or None if there is none.

    Raises:
        RefusedError: the name is a link out of the directory.
    """
    path = member(directory, name)
    return path if os.path.exists(path) else None


def gguf_parts(first: Path, count: int) -> list[Path]:
    """Return the files of a GGUF that is split into parts.

    Args:
        first: one of the parts, named as in `model-00001-of-00003.gguf`.
        count: the number of parts that it declares.

    Raises:
        RefusedError: the name is not that of one of so many parts.
    """
    found = _PART.fullmatch(first.name)
    if found is None or int(found[3]) != count:
        raise RefusedError(
            f"{shown(str(first))}: expected the name of one of its {count} parts, as in "
            f"NAME-00001-of-{count:05d}.gguf; got {shown(first.name)}; give the parts back their "
            "names, or join them with llama-gguf-split --merge"
        )
    return [
        member(first.parent, f"{found[1]}-{part:05d}-of-{count:05d}.gguf")
        for part in range(1, count + 1)
    ]


def _in_directory(directory: Path, names: list[str]) -> ModelFiles:
    if WHOLE in names:
        return ModelFiles(directory, "safetensors", member(directory, WHOLE))
    if INDEX in names:
        return ModelFiles(directory, "index", member(directory, INDEX))
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        return ModelFiles(directory, "safetensors", _only(directory, tensors, f", or {INDEX}"))
    ggufs = [name for name in names if name.endswith(".gguf")]
    heads = [name for name in ggufs if not (part := _PART.fullmatch(name)) or int(part[2]) == 1]
    if heads:
        return ModelFiles(directory, "gguf", _only(directory, heads, "; name the one to read"))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickled(directory, pickles)
    raise RefusedError(
        f"{shown(str(directory))}: expected {WHOLE}, {INDEX} or a .gguf file; got none of them"
    )


def _only(directory: Path, names: list[str], otherwise: str) -> Path:
    if len(names) > 1:
        raise RefusedError(
            f"{shown(str(directory))}: expected one file of weights{otherwise}; got {len(names)}: "
            f"{_listed(names)}"
        )
    return member(directory, names[0])


def _pickled(directory: Path, names: list[str]) -> RefusedError:
    return RefusedError(
        f"{shown(str(directory))}: expected safetensors or GGUF; got pickles ({_listed(names)}), "
        "which run code when they are opened; convert them where you trust them: python -c 'from "
        "transformers import AutoModelForCausalLM as M; "
        'M.from_pretrained("OLD").save_pretrained("NEW")\''
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(map(shown, names[:_MOST_SHOWN])) + more
