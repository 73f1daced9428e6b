"""A short text that tells checkpoints apart, so that results of two models never mix in records.

Reading hundreds of gigabytes for a digest would take longer than loading them. So the digest is of
every name, dtype and shape, and of a sample of the bytes: enough to tell a fine-tuned model from
its base, though no proof that two files are equal. It doesn't depend on how tensors lie in files.
"""

from __future__ import annotations

import hashlib

from pympa.checkpoint.mapped import MappedFiles
from pympa.checkpoint.tensors import Tensors

_MOST_SAMPLED = 1024  # tensors; each sample is a page from the disk
_SAMPLE_BYTES = 64
_DIGITS = 16  # 64 bits


def fingerprint(tensors: Tensors) -> str:
    """Return 16 hexadecimal digits that identify the weights of a checkpoint.

    Args:
        tensors: the checkpoint as it is stored.

    Raises:
        RefusedError: a file has changed since it was opened.
    """
    digest, files = hashlib.sha256(), MappedFiles(streams=False)
    every = -(-len(tensors.stored) // _MOST_SAMPLED)
    for index, name in enumerate(sorted(tensors.stored)):
        tensor = tensors.stored[name]
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        if index % every == 0:
            middle = tensor.nbytes // 2
            digest.update(files.bytes_of(tensor)[middle : middle + _SAMPLE_BYTES].tobytes())
    return digest.hexdigest()[:_DIGITS]
