"""Without eviction a cache changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import make_cache
from transformers import DynamicCache

from spectralkv import policies
from spectralkv.hf import cache_argument
from tiny_models import FAMILIES, implementations, make_model, random_ids

CASES = [(family, name) for family in FAMILIES for name in implementations(family)]


@pytest.mark.parametrize("policy", [policies.Full(), policies.H2O(budget=500)], ids=["full", "h2o"])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_generation_without_eviction_equals_dynamic_cache(
    family: str, implementation: str, policy: policies.Policy, device: str
) -> None:
    model = make_model(family, implementation, torch.float32, device=device)
    ids = random_ids(2, 37, device=device)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, **cache_argument(DynamicCache(config=model.config)), **options)
    got = model.generate(ids, **cache_argument(make_cache(model.config, policy)), **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_chunks_without_eviction_equal_dynamic_cache(
    family: str, implementation: str, device: str
) -> None:
    model = make_model(family, implementation, device=device)
    ids = random_ids(2, 60, device=device)
    caches = [DynamicCache(config=model.config), make_cache(model.config, policies.TOVA(budget=99))]
    with torch.no_grad():
        for chunk in ids.split([20, 1, 1, 17, 21], dim=1):
            expected, got = (model(chunk, **cache_argument(cache)).logits for cache in caches)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert [cache.get_seq_length() for cache in caches] == [60, 60]
