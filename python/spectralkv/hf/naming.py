"""What one version of transformers names otherwise than the next."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Cache, GenerationMixin

# From 5.24 on `cache`; the old name still works there, with a warning.
_PREPARE = inspect.signature(GenerationMixin.prepare_inputs_for_generation)
_NAME = "cache" if "cache" in _PREPARE.parameters else "past_key_values"


def cache_argument(cache: Cache) -> dict[str, Any]:
    """Return a cache as the argument by which models and ``generate`` take it.

    That is ``cache=`` from transformers 5.24 on and ``past_key_values=`` before: code that is to
    run with both, without a warning, writes ``model(ids, **cache_argument(cache))``.

    Parameters
    ----------
    cache : transformers.Cache
        Any cache, one of transformers' own as well.

    Returns
    -------
    dict
        One name, and the cache.
    """
    return {_NAME: cache}
