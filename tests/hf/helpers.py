"""What the tests of the caches share."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from spectralkv import policies
from spectralkv.hf import EvictingCache, cache_argument


def make_cache(config: Any, policy: policies.Policy, **options: Any) -> EvictingCache:
    """Return a cache without the warning that some layers do not evict.

    Where nothing else is said the model attends, on CUDA as on the CPU: slots then follow the text,
    and equal neighbours and walks do not depend on padding.
    """
    options.setdefault("attention", "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return EvictingCache(config, policy, **options)


def feed(model: Any, cache: Any, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Feed `ids` in chunks; return the logits of all tokens."""
    with torch.no_grad():
        chunks = ids.split(sizes, dim=1)
        return torch.cat([model(chunk, **cache_argument(cache)).logits for chunk in chunks], 1)
