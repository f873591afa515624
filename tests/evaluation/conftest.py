from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from spectralkv.evaluation import LoadedModel


@pytest.fixture
def tiny() -> LoadedModel:
    """A llama of two layers with random weights, and a tokenizer with a token a byte."""
    from tiny_text import make_loaded  # torch may be missing when this file is read

    return make_loaded()
