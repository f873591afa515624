"""Outputs in the caller's framework.

The core reads every DLPack tensor by itself; what this module adds is memory for results in the
framework that the caller uses, without importing any of them.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

from spectralkv._core import InvalidArgument

Array = Any
OutputDType = Literal["float32", "int32", "uint32", "uint8"]


def _framework(array_like: Array) -> str:
    return type(array_like).__module__.partition(".")[0]


def readable(tensor: Array) -> Array:
    """Return the tensor detached: torch refuses to export what requires a gradient."""
    if _framework(tensor) == "torch" and tensor.requires_grad:
        return tensor.detach()
    return tensor


def filled(
    like: Array, shape: Sequence[int], dtype: OutputDType, write: Callable[[Array], None]
) -> Array:
    """Return a new tensor of the framework and device of ``like`` that ``write`` has filled."""
    framework = _framework(like)
    if framework == "torch":
        torch = sys.modules["torch"]
        tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=like.device)
        write(tensor)
        return tensor
    if framework in ("numpy", "cupy"):
        module = sys.modules[framework]
        tensor = module.empty(tuple(shape), dtype=dtype)
        write(tensor)
        return tensor
    if framework in ("jax", "jaxlib"):
        # jax arrays are immutable: the result is written to host memory of our own first.
        import numpy as np

        host = np.empty(tuple(shape), dtype=dtype)
        write(host)
        return sys.modules["jax"].numpy.asarray(host)
    raise InvalidArgument(
        "a tensor must be of torch, numpy, cupy or jax to tell the framework of results, got "
        f"{type(like).__module__}.{type(like).__qualname__}"
    )


def constant_int32(value: int, shape: Sequence[int]) -> memoryview:
    """Make an int32 tensor in host memory that needs no framework."""
    size = prod(shape)
    data = memoryview(array("i", [value]) * size)
    return data.cast("B").cast("i", tuple(shape)) if size else data
