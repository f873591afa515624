"""KV-cache eviction by personalized PageRank on the attention graph."""

from __future__ import annotations

from spectralkv._core import __version__, built_with_cuda, cuda_device_count, cuda_status
from spectralkv._paths import get_cmake_dir, get_include

__all__ = [
    "__version__",
    "built_with_cuda",
    "cuda_device_count",
    "cuda_status",
    "get_cmake_dir",
    "get_include",
]
