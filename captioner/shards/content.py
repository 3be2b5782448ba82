"""A checksum of the content of arrays and text, independent of how a library serialises them. Imports no torch."""

import hashlib
from collections.abc import Mapping

import numpy as np


def content_sha256(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Hex sha256 of a text and of each array's name, type, shape and elements; the order of the arrays does not matter.

    Unlike the bytes of a safetensors file, whose padding and order of tensors may change with the library's version.
    """
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
