"""KV-cache eviction by personalized PageRank on the attention graph."""

from __future__ import annotations

from spectralkv._core import (
    BackendUnavailable,
    CudaError,
    InvalidArgument,
    SpectralKVError,
    __version__,
    built_with_cuda,
    cpu_simd,
    cpu_threads,
    cuda_device_count,
    cuda_device_name,
    cuda_driver_version,
    cuda_status,
)
from spectralkv._paths import get_cmake_dir, get_include
from spectralkv.attention import decode_attention
from spectralkv.config import (
    EvictionConfig,
    GraphConfig,
    MonitorConfig,
    Population,
    Rotary,
    WalkConfig,
    apply_preset,
)
from spectralkv.graph import SpectralGraph
from spectralkv.manager import ALL_LAYERS, GraphManager
from spectralkv.monitor import Monitor

__all__ = [
    "ALL_LAYERS",
    "BackendUnavailable",
    "CudaError",
    "EvictionConfig",
    "GraphConfig",
    "GraphManager",
    "InvalidArgument",
    "Monitor",
    "MonitorConfig",
    "Population",
    "Rotary",
    "SpectralGraph",
    "SpectralKVError",
    "WalkConfig",
    "__version__",
    "apply_preset",
    "built_with_cuda",
    "cpu_simd",
    "cpu_threads",
    "cuda_device_count",
    "cuda_device_name",
    "cuda_driver_version",
    "cuda_status",
    "decode_attention",
    "get_cmake_dir",
    "get_include",
]
