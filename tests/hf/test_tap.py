"""The tap touches only its own caches."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from helpers import feed, make_cache
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from spectralkv import policies
from spectralkv.hf import cache_argument, tap
from tiny_models import implementations, make_model, random_ids

H2O = policies.H2O(budget=24, interval=8)


@pytest.fixture(autouse=True)
def _installed() -> None:
    tap.install()


def test_installing_again_changes_nothing() -> None:
    before = AttentionInterface.get_interface
    threads = [threading.Thread(target=tap.install) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert AttentionInterface.get_interface is before


def test_names_and_errors_of_transformers_stay() -> None:
    sdpa = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    assert sdpa.__name__ == "sdpa_attention_forward"
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is sdpa
    with pytest.raises(KeyError, match="no_such_attention"):
        ALL_ATTENTION_FUNCTIONS.get_interface("no_such_attention", None)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS.valid_keys()


def test_eager_falls_back_to_what_the_model_brings() -> None:
    def brought(*args: Any, **kwargs: Any) -> str:
        return f"brought {len(args)} {sorted(kwargs)}"

    found = ALL_ATTENTION_FUNCTIONS.get_interface("eager", brought)
    tensors = (torch.zeros(1),) * 3
    assert found(None, *tensors, None, scaling=1.0) == "brought 5 ['scaling']"


def test_attention_named_later_is_tapped_too() -> None:
    calls: list[str] = []

    def late(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append("late")
        base = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return base(module, query, key, value, mask, **kwargs)

    model = make_model("llama", seed=11)
    cache = make_cache(model.config, H2O)
    AttentionInterface.register("late_attention", late)
    try:
        model.config._attn_implementation = "late_attention"
        feed(model, cache, random_ids(1, 50), [50])
    finally:
        model.config._attn_implementation = "sdpa"
        del AttentionInterface._global_mapping["late_attention"]
    assert len(calls) == 2
    assert cache.stats().tokens_kept == 24


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_other_caches_pass_untouched(family: str) -> None:
    model = make_model(family, implementations(family)[0])
    ids = random_ids(2, 30)
    options = {"max_new_tokens": 10, "do_sample": False}
    make_cache(model.config, H2O)
    expected = model.generate(ids, use_cache=False, **options)
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=64),
    ):
        assert torch.equal(model.generate(ids, **cache_argument(cache), **options), expected)


def test_an_offer_is_for_its_own_keys_and_thread_alone() -> None:
    cache = make_cache(make_model("llama").config, H2O)
    keys = torch.zeros(1, 2, 3, 8)
    kept, _ = cache.update(keys, keys, 0)
    seen: list[Any] = []

    def attention(*args: Any, **_: Any) -> None:
        seen.append(args[4])

    found = ALL_ATTENTION_FUNCTIONS.get_interface("eager", attention)
    query = torch.zeros(1, 4, 3, 8)
    layer = cache.evicting_layers[0]
    found(None, query, kept.clone(), keys, "untouched")
    thread = threading.Thread(target=found, args=(None, query, kept, keys, "untouched"))
    thread.start()
    thread.join()
    assert seen == ["untouched"] * 2
    assert layer.lengths == (0,)
    found(None, query, kept, keys, None, scaling=0.5)
    assert layer.lengths == (3,)
    found(None, query, kept, keys, "untouched")
    assert seen == ["untouched", "untouched", None, "untouched"]


def test_a_forward_pass_that_broke_off_keeps_no_cache_alive() -> None:
    cache = make_cache(make_model("llama").config, H2O)
    keys = torch.zeros(1, 2, 3, 8)
    cache.update(keys, keys, 0)  # and no attention after it
    held = weakref.ref(cache.evicting_layers[0])
    del cache
    gc.collect()
    assert held() is None


def test_a_compiled_forward_without_our_cache_has_no_graph_break() -> None:
    model = make_model("llama", dtype=torch.float32, seed=12)
    ids = random_ids(1, 8)
    compiled = torch.compile(model.model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(ids, use_cache=False).last_hidden_state
        expected = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, expected)
