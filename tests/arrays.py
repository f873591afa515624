"""Arrays of any framework on any device, for tests that run on all of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import spectralkv

# What packing rows may change in a probability; twice that where rows are packed apart.
PACKED_UNIT = 65537 / 2**32

FRAMEWORKS = [
    pytest.param(("numpy", "cpu"), id="numpy-cpu"),
    pytest.param(("torch", "cpu"), id="torch-cpu"),
    pytest.param(("jax", "cpu"), id="jax-cpu"),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(("cupy", "cuda"), id="cupy-cuda", marks=pytest.mark.gpu),
    pytest.param(("jax", "cuda"), id="jax-cuda", marks=pytest.mark.gpu),
]


def missing_cuda() -> str:
    """Return why a test that needs a GPU and torch cannot run; empty when it can."""
    if spectralkv.cuda_device_count() == 0:
        return spectralkv.cuda_status()
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


@dataclass(frozen=True)
class Arrays:
    """One framework on one device. Makes its arrays from numpy's and numpy's from its."""

    framework: str
    device: str

    def __call__(self, host: Any, dtype: str | None = None) -> Any:
        host = np.asarray(host)
        if self.framework == "numpy":
            return host if dtype is None else host.astype(dtype)
        module: Any = importlib.import_module(self.framework)
        if self.framework == "torch":
            tensor = module.from_numpy(host.copy()).to(self.device)
            return tensor if dtype is None else tensor.to(getattr(module, dtype))
        if self.framework == "cupy":
            array = module.asarray(host)
            return array if dtype is None else array.astype(dtype)
        platform = "gpu" if self.device == "cuda" else "cpu"
        placed = module.device_put(host, module.devices(platform)[0])
        return placed if dtype is None else placed.astype(dtype)

    def host(self, array: Any) -> np.ndarray:
        if self.framework == "torch":
            return array.detach().cpu().numpy()
        if self.framework == "cupy":
            return array.get()
        return np.asarray(array)

    def is_mine(self, array: Any) -> bool:
        """Tell whether an array is of this framework, on this device."""
        name = type(array).__module__.partition(".")[0]
        if name.removesuffix("lib") != self.framework:
            return False
        if self.framework == "torch":
            return array.device.type == self.device
        if self.framework == "jax":
            return array.device.platform == ("gpu" if self.device == "cuda" else "cpu")
        return True

    def skip_if_missing(self) -> None:
        """Skip the test, with the reason, where framework or device are not there."""
        module: Any = pytest.importorskip(self.framework)
        if self.device != "cuda":
            return
        if spectralkv.cuda_device_count() == 0:
            pytest.skip(spectralkv.cuda_status())
        if self.framework == "torch" and not module.cuda.is_available():
            pytest.skip(f"torch {module.__version__} finds no CUDA device")
        if self.framework == "jax":
            try:
                _start_jax(module)
            except RuntimeError as error:
                pytest.skip(f"jax finds no CUDA device: {error}")


def _start_jax(jax: Any) -> None:
    """Start jax on its GPUs; RuntimeError if it has none.

    It leaves the last of several devices current, which other frameworks' "cuda" would then mean.
    """
    torch = pytest.importorskip("torch")
    before = torch.cuda.current_device()
    try:
        jax.devices("gpu")
    finally:
        torch.cuda.set_device(before)
