"""The real thing: SmolLM2-135M-Instruct."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spectralkv import policies
from spectralkv.hf import EvictingCache, SpectralCache, cache_argument

TEXT = (
    "The lighthouse stood at the end of a narrow spit of land, and every evening at dusk the "
    "keeper climbed its two hundred steps to light the lamp. In winter the wind came straight "
    "from the north and shook the windows; in summer the boats passed so close that he could hear "
    "the crews talking. He wrote down each of them in a ledger: the name, the hour, the weather. "
    "When the ledger was full he began another, and over the years they filled a shelf. "
)


def ids_of(demo: Any, text: str) -> torch.Tensor:
    return demo.tokenizer(text, return_tensors="pt").input_ids


@pytest.mark.slow
def test_no_eviction_generates_the_same_text(demo_model: Any) -> None:
    model = demo_model.model
    ids = ids_of(demo_model, TEXT)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **cache_argument(DynamicCache(config=model.config)), **options)
    cache = EvictingCache(model.config, policies.SnapKV(budget=2000))
    assert torch.equal(model.generate(ids, **cache_argument(cache), **options), expected)


@pytest.mark.slow
def test_generation_at_a_small_budget(demo_model: Any) -> None:
    model = demo_model.model
    ids = ids_of(demo_model, TEXT * 3)
    cache = SpectralCache(model.config, budget=96, interval=16)
    output = model.generate(ids, **cache_argument(cache), max_new_tokens=20, do_sample=False)
    stats = cache.stats()
    assert stats.tokens_seen == output.shape[1] - 1
    assert 96 <= stats.tokens_kept < 112
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    itemsize = model.dtype.itemsize
    assert stats.kv_bytes == 2 * model.config.num_hidden_layers * heads * 112 * dim * itemsize
    text = demo_model.tokenizer.decode(output[0, ids.shape[1] :])
    # It has read the same paragraph three times: it goes on with it.
    assert "lighthouse" in text or "land" in text
