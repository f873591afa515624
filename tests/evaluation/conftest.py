from __future__ import annotations

import pytest

from spectralkv.evaluation import LoadedModel
from tiny_text import make_loaded


@pytest.fixture
def tiny() -> LoadedModel:
    """A llama of two layers with random weights, and a tokenizer with a token a byte."""
    return make_loaded()
