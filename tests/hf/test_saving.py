"""Caches in files: what is generated after loading is what would have been without it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import feed, make_cache
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from spectralkv import Population, policies
from spectralkv.hf import EvictingCache, EvictionEvent, SpectralCache, cache_argument, saving
from spectralkv.policies import Observation, Policy, ScoreTracker, Tracker
from tiny_models import make_config, make_model, random_ids

SHARED = {"budget": 24, "interval": 8}
FORGETFUL = (
    Population(restart="recent", share=0.5, decay=0.7),
    Population(restart="novelty", count="all", share=0.5),
)
POLICIES = {
    "spectral": policies.Spectral(**SHARED, window=6, sinks=2),
    "spectral that remembers": policies.Spectral(
        **SHARED, window=6, walk_interval=3, populations=FORGETFUL
    ),
    "spectral, a graph a layer": policies.Spectral(
        **SHARED, window=6, scope="layer", edge_law="attention", decay=0.5
    ),
    "spectral, a population exact": policies.Spectral(
        **SHARED,
        window=6,
        populations=(Population(share=0.6), replace(FORGETFUL[1], share=0.4, solver="exact")),
    ),
    "spectral that scans now and then": policies.Spectral(
        **SHARED, window=6, walk_interval=3, scan_interval=3
    ),
    "h2o": policies.H2O(**SHARED),
    "h2o that forgets": policies.H2O(**SHARED, decay=0.9),
    "snapkv": policies.SnapKV(**SHARED, window=10),
    "tova": policies.TOVA(**SHARED),
    "streaming_llm": policies.StreamingLLM(**SHARED, window=10),
    "keydiff": policies.KeyDiff(**SHARED),
    "rkv": policies.RKV(**SHARED),
    "lazy_eviction": policies.LazyEviction(**SHARED, window=6),
    "random": policies.Random(**SHARED, window=4, sinks=2),
    "mix": policies.Mix(**SHARED, window=6, of="spectral+h2o", options=(("spectral__decay", 0.5),)),
    "full": policies.Full(),
}


def model_for(policy: Policy, device: str = "cpu", family: str = "llama") -> Any:
    has_graphs = "spectral" in (policy.name, *getattr(policy, "of", "").split("+"))
    dtype = torch.float32 if has_graphs else torch.float64
    return make_model(family, dtype=dtype, device=device)


def generate(model: Any, cache: Any, ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    return model.generate(
        ids, **cache_argument(cache), max_new_tokens=count, do_sample=False, **options
    )


def reload(cache: EvictingCache, model: Any, path: Path, **options: Any) -> EvictingCache:
    options.setdefault("attention", "model")  # as make_cache has it
    cache.save(path)
    return EvictingCache.load(path, model.config, device=model.device, **options)


def assert_same(one: EvictingCache, other: EvictingCache) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    assert one.stats().evictions == other.stats().evictions
    for mine, theirs in zip(one.evicting_layers, other.evicting_layers, strict=True):
        assert mine.lengths == theirs.lengths
        assert torch.equal(mine.positions(), theirs.positions())
        assert torch.equal(mine.keys, theirs.keys)


@pytest.mark.parametrize("name", POLICIES)
def test_a_conversation_goes_on_as_if_never_saved(name: str, tmp_path: Path, device: str) -> None:
    model = model_for(POLICIES[name], device)
    cache = make_cache(model.config, POLICIES[name])
    ids = generate(model, cache, random_ids(1, 45, device=device), 10)
    loaded = reload(cache, model, tmp_path / "talk.safetensors")
    assert loaded.policy == POLICIES[name]
    assert_same(cache, loaded)
    # Two more turns, saved between them, too.
    for turn in range(2):
        ids = torch.cat((ids, random_ids(1, 15, seed=turn, device=device)), 1)
        expected = generate(model, cache, ids, 20)
        assert torch.equal(generate(model, loaded, ids, 20), expected)
        assert_same(cache, loaded)
        loaded = reload(loaded, model, tmp_path / "talk.safetensors")
        ids = expected


def test_devices_are_one_or_one_for_each_layer(tmp_path: Path) -> None:
    model, path = model_for(POLICIES["h2o"]), tmp_path / "cache.safetensors"
    cache = make_cache(model.config, POLICIES["h2o"])
    generate(model, cache, random_ids(1, 45), 10)
    cache.save(path)
    assert_same(cache, EvictingCache.load(path, model.config, device=["cpu", "cpu"]))
    with pytest.raises(ValueError, match=r"one device, or 2: one for each layer, got 3"):
        EvictingCache.load(path, model.config, device=["cpu"] * 3)


def test_slots_with_gaps_are_closed_to_be_saved(tmp_path: Path, device: str) -> None:
    # The exact solver: walkers that restart draw a slot, and slots are others here.
    policy = policies.Spectral(**SHARED, window=6, sinks=2, solver="exact")
    model = model_for(policy, device)
    ids = random_ids(2, 120, device=device)
    plain = make_cache(model.config, policy)
    cache = make_cache(model.config, policy, attention="policy")
    for each in (plain, cache):
        feed(model, each, ids[:, :70], [20] + [1] * 50)
    assert cache.stats().attention == "policy"
    loaded = reload(cache, model, tmp_path / "talk.safetensors", attention="policy")
    expected = feed(model, plain, ids[:, 70:], [1] * 50)
    for each in (cache, loaded):
        got = feed(model, each, ids[:, 70:], [1] * 50)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert each.get_seq_length() == 120


def test_a_copy_with_gaps_between_slots_goes_on(device: str) -> None:
    model = model_for(POLICIES["spectral"], device)
    ids = random_ids(2, 120, device=device)
    cache = make_cache(model.config, POLICIES["spectral"], attention="policy")
    feed(model, cache, ids[:, :70], [20] + [1] * 50)
    copied = copy.deepcopy(cache)
    expected = feed(model, cache, ids[:, 70:], [1] * 50)
    assert torch.equal(feed(model, copied, ids[:, 70:], [1] * 50), expected)
    assert copied.stats() == cache.stats()


@pytest.mark.parametrize(
    "name",
    ["spectral", "spectral that scans now and then", "h2o", "snapkv", "lazy_eviction", "mix"],
)
def test_padded_sequences_go_on(name: str, tmp_path: Path, device: str) -> None:
    model = model_for(POLICIES[name], device)
    ids, mask = random_ids(3, 40, device=device), torch.ones(3, 40, dtype=torch.long, device=device)
    mask[0, :30] = mask[1, :7] = 0
    cache = make_cache(model.config, POLICIES[name])
    ids = generate(model, cache, ids, 5, attention_mask=mask)
    loaded = reload(cache, model, tmp_path / "talk.safetensors")
    mask = torch.cat((mask, mask.new_ones(3, 5)), 1)
    expected = generate(model, cache, ids, 30, attention_mask=mask)
    assert torch.equal(generate(model, loaded, ids, 30, attention_mask=mask), expected)
    assert_same(cache, loaded)


def test_drafts_are_taken_back_after_loading(tmp_path: Path) -> None:
    model = model_for(POLICIES["spectral"])
    cache = make_cache(model.config, POLICIES["spectral"])
    ids = random_ids(1, 90)
    feed(model, cache, ids[:, :45], [40, 5])
    loaded = reload(cache, model, tmp_path / "talk.safetensors")
    for each in (cache, loaded):
        each.crop(-3)
        each.batch_repeat_interleave(2)
    more = ids[:, 42:].repeat(2, 1)
    assert torch.equal(feed(model, cache, more, [1] * 48), feed(model, loaded, more, [1] * 48))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_layers_with_a_sliding_window_go_on(family: str, tmp_path: Path) -> None:
    model = make_model(family, "eager", dtype=torch.float32)
    cache = make_cache(model.config, POLICIES["spectral"])
    ids = generate(model, cache, random_ids(1, 61), 30)
    loaded = reload(cache, model, tmp_path / "talk.safetensors")
    expected = generate(model, cache, ids, 40)
    assert torch.equal(generate(model, loaded, ids, 40), expected)


def test_a_cache_that_saw_nothing(tmp_path: Path) -> None:
    model = model_for(POLICIES["h2o"])
    loaded = reload(make_cache(model.config, POLICIES["h2o"]), model, tmp_path / "new.safetensors")
    ids = random_ids(1, 50)
    expected = generate(model, make_cache(model.config, POLICIES["h2o"]), ids, 10)
    assert torch.equal(generate(model, loaded, ids, 10), expected)


def test_scores_and_events_after_loading(tmp_path: Path) -> None:
    model = model_for(POLICIES["h2o"])
    cache = make_cache(model.config, POLICIES["h2o"])
    feed(model, cache, random_ids(1, 30), [30])
    events: list[EvictionEvent] = []
    loaded = reload(cache, model, tmp_path / "talk.safetensors", on_evict=events.append)
    for mine, theirs in zip(cache.evicting_layers, loaded.evicting_layers, strict=True):
        assert torch.equal(mine._tracker.scores(), theirs._tracker.scores())
    feed(model, loaded, random_ids(1, 2, seed=1), [2])
    assert [event.layer for event in events] == [0, 1]


class Longest(Policy):
    """A policy of one's own, without state."""

    name = "longest"

    def trackers(self, num_layers: int) -> list[Tracker]:
        return [_LongestTracker(self) for _ in range(num_layers)]


class _LongestTracker(ScoreTracker[Longest]):
    def scores(self) -> torch.Tensor:
        return self._observed().values.norm(dim=-1).float()


class Counting(Longest):
    """A policy of one's own whose tracker gathers something that it does not save."""

    name = "counting"

    def trackers(self, num_layers: int) -> list[Tracker]:
        return [_CountingTracker(self) for _ in range(num_layers)]


class _CountingTracker(_LongestTracker):
    def observe(self, observation: Observation) -> None:
        super().observe(observation)
        self.count = getattr(self, "count", 0) + 1


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    model = model_for(POLICIES["h2o"])
    policy = Longest(**SHARED, window=6)
    cache = make_cache(model.config, policy)
    ids = generate(model, cache, random_ids(1, 61), 10)
    loaded = reload(cache, model, tmp_path / "talk.safetensors", policy=policy)
    expected = generate(model, cache, ids, 20)
    assert torch.equal(generate(model, loaded, ids, 20), expected)
    with pytest.raises(ValueError, match=r"\[create\] policy must be one of .*, got 'longest'"):
        EvictingCache.load(tmp_path / "talk.safetensors", model.config)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = model_for(POLICIES["h2o"])
    path = tmp_path / "talk.safetensors"
    cache = make_cache(model.config, Counting(**SHARED, window=6))
    feed(model, cache, random_ids(1, 30), [30])
    with pytest.raises(TypeError, match="must have state_dict and load_state_dict"):
        cache.save(path)
    cache = make_cache(model.config, POLICIES["h2o"])
    keys = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    cache.update(keys, keys, 0)
    with pytest.raises(RuntimeError, match="expected a forward pass that has ended"):
        cache.save(path)
    assert not path.exists()
    foreign = DynamicCache(config=model.config).layers
    with pytest.raises(TypeError, match="got DynamicLayer in layer 0"):
        saving.write(path, model.config, POLICIES["h2o"], foreign)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = model_for(POLICIES["h2o"])
    cache = make_cache(model.config, POLICIES["h2o"])
    feed(model, cache, random_ids(1, 30), [30])
    cache.save(tmp_path / "talk.safetensors")
    return tmp_path / "talk.safetensors"


def test_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"model's num_hidden_layers must be 2 as in .*, got 3"):
        EvictingCache.load(saved, make_config("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"model's model_type must be 'llama' as in .*'qwen2'"):
        EvictingCache.load(saved, make_config("qwen2"))


def test_another_policy_is_refused(saved: Path) -> None:
    config = make_config("llama")
    with pytest.raises(ValueError, match=r"policy must be h2o as in .*, got snapkv"):
        EvictingCache.load(saved, config, policy=policies.SnapKV(budget=512))
    with pytest.raises(ValueError, match=r"h2o's budget must be 24 as in .*, got 32"):
        EvictingCache.load(saved, config, policy=policies.H2O(budget=32, interval=8))
    with pytest.raises(ValueError, match="policy of a SpectralCache must be spectral, got h2o"):
        SpectralCache.load(saved, config)


def test_another_version_and_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    config = make_config("llama")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        EvictingCache.load(tmp_path / "none.safetensors", config)
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors", encoding="utf-8")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        EvictingCache.load(text, config)
    tensors = load_file(saved)
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    with pytest.raises(ValueError, match=r"must be a cache that EvictingCache\.save wrote"):
        EvictingCache.load(other, config)
    head = {"format": "spectralkv cache", "format_version": 99, "spectralkv": "9.9.9"}
    save_file(tensors, other, metadata={"spectralkv": json.dumps(head)})
    with pytest.raises(ValueError, match=r"format version 1, got version 99 of spectralkv 9\.9\.9"):
        EvictingCache.load(other, config)


def test_a_spectral_cache_loads_as_one(tmp_path: Path) -> None:
    model = model_for(POLICIES["spectral"])
    cache = SpectralCache(model.config, budget=64)
    feed(model, cache, random_ids(1, 30), [30])
    cache.save(tmp_path / "talk.safetensors")
    loaded = SpectralCache.load(tmp_path / "talk.safetensors", model.config)
    assert type(loaded) is SpectralCache
    assert loaded.policy == cache.policy
