"""Sizes, memory, roll-back, errors and reports of a cache."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import feed, make_cache
from transformers import BertConfig, DynamicCache, T5Config
from transformers.cache_utils import DynamicLayer

from spectralkv import policies
from spectralkv.hf import EvictingCache, EvictionEvent, SpectralCache, cache_argument
from tiny_models import make_config, make_model, random_ids

H2O = policies.H2O(budget=24, interval=8)


def slab_bytes(capacity: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> int:
    """Bytes of keys and values of the tiny llama: 2 layers, 2 KV heads, head_dim 8."""
    return 2 * 2 * batch * 2 * capacity * 8 * dtype.itemsize


# -- lengths and positions


def test_logical_and_physical_lengths_part(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, H2O)
    feed(model, cache, random_ids(1, 60, device=device), [50, 1, 1, 8])
    layer = cache.evicting_layers[0]
    # 50 -> 24, two more, eight more: 34 -> 24.
    assert (cache.get_seq_length(), layer.num_slots, layer.lengths) == (60, 24, (24,))
    assert cache.get_mask_sizes(5, 0) == (29, 36)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert layer.keys.shape == (1, 2, 24, 8)


@pytest.mark.parametrize("sizes", [[31], [32], [24], [1] * 32, [31, 1], [25, 32], [5, 90]])
def test_a_sequence_is_cut_at_budget_plus_interval(sizes: list[int], device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, H2O)
    held = 0
    ids = random_ids(1, sum(sizes), device=device)
    for chunk in ids.split(sizes, dim=1):
        feed(model, cache, chunk, [chunk.shape[1]])
        held += chunk.shape[1]
        held = 24 if held >= 32 else held
        assert [layer.num_slots for layer in cache.evicting_layers] == [held, held]


def test_positions_tell_where_each_token_stands(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(
        model.config, policies.StreamingLLM(budget=24, interval=8, window=4, sinks=4)
    )
    feed(model, cache, random_ids(1, 45, device=device), [40, *[1] * 5])
    expected = [*range(4), *range(20, 40), *range(40, 45)]
    for layer in cache.evicting_layers:
        positions = layer.positions()
        assert positions.dtype == torch.int32
        assert positions.tolist() == [[expected, expected]]


def test_heads_keep_different_tokens(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, policies.KeyDiff(budget=24, interval=8))
    feed(model, cache, random_ids(1, 60, device=device), [60])
    positions = cache.evicting_layers[1].positions()[0]
    assert positions[0].tolist() != positions[1].tolist()


def test_all_heads_of_tova_keep_the_same_tokens(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, policies.TOVA(budget=24, interval=8))
    feed(model, cache, random_ids(2, 60, device=device), [60])
    positions = cache.evicting_layers[1].positions()
    assert torch.equal(positions[:, 0], positions[:, 1])


# -- memory


def test_bytes_are_those_of_the_tensors(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, H2O)
    assert cache.stats().kv_bytes == 0
    feed(model, cache, random_ids(1, 20, device=device), [20])
    layer = cache.evicting_layers[0]
    storage = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
    assert cache.stats().kv_bytes == 2 * storage == slab_bytes(32)
    stats = cache.stats()
    # H2O: one float64 sum a slot, for 2 layers and 2 heads; nothing was compacted yet.
    assert stats.graph_bytes == 2 * 2 * 32 * 8
    feed(model, cache, random_ids(1, 100, device=device), [100])
    # Now also int32 positions of what was kept.
    assert cache.stats().graph_bytes == 2 * (2 * 32 * 8 + 2 * 24 * 4)


def test_memory_is_given_back_after_a_long_prompt(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, H2O)
    feed(model, cache, random_ids(2, 700, device=device), [700])
    assert cache.stats().kv_bytes == slab_bytes(32, batch=2)
    assert [layer.keys.untyped_storage().nbytes() for layer in cache.evicting_layers] == [
        2 * 2 * 32 * 8 * 8
    ] * 2
    feed(model, cache, random_ids(2, 40, device=device), [1] * 40)
    assert cache.stats().kv_bytes == slab_bytes(32, batch=2)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova", "keydiff", "rkv", "random", "spectral"])
def test_no_policy_keeps_the_prompt_alive(name: str, device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    policy = policies.create(name, budget=24, interval=8, window=4)
    cache = make_cache(model.config, policy)
    feed(model, cache, random_ids(1, 900, device=device), [900])
    alive = [
        tensor
        for tensor in gc.get_objects()
        if type(tensor) is torch.Tensor and tensor.dim() == 4 and tensor.shape[:2] == (1, 2)
        and tensor.untyped_storage().nbytes() >= 2 * 900 * 8 * 4
    ]  # fmt: skip
    assert not alive
    assert cache.stats().kv_bytes == slab_bytes(32, dtype=torch.float32)


def test_steady_decoding_allocates_no_new_slab(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, H2O)
    feed(model, cache, random_ids(1, 40, device=device), [40])
    addresses = {layer.keys.data_ptr() for layer in cache.evicting_layers}
    for token in random_ids(1, 50, device=device).split(1, dim=1):
        feed(model, cache, token, [1])
        assert {layer.keys.data_ptr() for layer in cache.evicting_layers} == addresses


def test_a_full_cache_grows_by_an_eighth(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, policies.Full())
    feed(model, cache, random_ids(1, 801, device=device), [800, 1])
    assert cache.stats().kv_bytes == slab_bytes(801 + 801 // 8)
    assert cache.stats().tokens_kept == 801


def test_stats(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, H2O)
    feed(model, cache, random_ids(1, 57, device=device), [40, 10, *[1] * 7])
    stats = cache.stats()
    assert (stats.tokens_seen, stats.tokens_kept) == (57, 31)
    assert (stats.evictions, stats.evicting_layers, stats.total_layers) == (4, 2, 2)
    assert stats.policy == "h2o"


# -- sliding layers


def test_sliding_layers_stay_and_the_user_is_told() -> None:
    config = make_config("gemma3")
    with pytest.warns(UserWarning, match=r"1 of 3 layers of this model evict"):
        cache = EvictingCache(config, H2O)
    foreign = DynamicCache(config=config).layers
    kinds = [type(layer) for layer in cache.layers]
    assert kinds[0] is type(foreign[0])
    assert kinds[2] is type(foreign[2])
    assert [layer.index for layer in cache.evicting_layers] == [1]
    assert (cache.stats().evicting_layers, cache.stats().total_layers) == (1, 3)
    with pytest.warns(UserWarning, match="1 of 3"):
        SpectralCache(config, budget=60)


def test_bytes_of_sliding_layers_count(device: str) -> None:
    model = make_model("gemma3", dtype=torch.float32, device=device)
    cache = make_cache(model.config, H2O)
    feed(model, cache, random_ids(1, 60, device=device), [60])
    sliding = sum(
        tensor.untyped_storage().nbytes()
        for layer in (cache.layers[0], cache.layers[2])
        for tensor in (layer.keys, layer.values)
    )
    assert cache.stats().kv_bytes == sliding + cache.evicting_layers[0].kv_nbytes()


def test_no_warning_where_all_layers_evict_or_none_is_asked_to() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EvictingCache(make_config("llama"), H2O)
        EvictingCache(make_config("gemma3"), policies.Full())


# -- roll-back


@pytest.mark.parametrize("padded", [False, True])
def test_crop_takes_the_newest_back(padded: bool, device: str) -> None:
    model = make_model("llama", device=device)
    ids = random_ids(2, 60, device=device)
    mask = torch.ones(2, 60, dtype=torch.long, device=device)
    if padded:
        mask[1, :20] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    policy = policies.KeyDiff(budget=24, interval=8, window=10)

    def run(cache: EvictingCache, start: int, end: int) -> torch.Tensor:
        with torch.no_grad():
            return model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=position_ids[:, start:end],
                **cache_argument(cache),
            ).logits

    cache = make_cache(model.config, policy)
    run(cache, 0, 40)
    straight = [run(cache, 40, 41), run(cache, 41, 44)]
    cache.crop(-4)
    assert cache.get_seq_length() == 40
    again = [run(cache, 40, 41), run(cache, 41, 44)]
    for one, other in zip(straight, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    positions = cache.evicting_layers[0].positions()
    cache.crop(-9)  # into what was there at the cut
    assert torch.equal(cache.evicting_layers[0].positions(), positions[:, :, :-9])
    assert cache.get_seq_length() == 35
    run(cache, 35, 60)
    held = cache.evicting_layers[0]
    assert held.positions()[0, 0, -1] == 59
    assert held.lengths == (24, 24)


def test_crop_errors(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, policies.KeyDiff(budget=24, interval=8, window=10))
    cache.crop(-3)  # nothing is there yet
    feed(model, cache, random_ids(1, 43, device=device), [40, 3])
    with pytest.raises(ValueError, match=r"tokens_to_remove must be 0 or minus .* got 5"):
        cache.crop(5)
    message = r"\[crop\] layer 0: at most 13 tokens can be taken back .*, got 14"
    with pytest.raises(RuntimeError, match=message):
        cache.crop(-14)
    assert cache.get_seq_length() == 43
    cache.crop(0)
    cache.crop(-13)
    assert cache.get_seq_length() == 30
    unevicted = make_cache(model.config, H2O)
    feed(model, unevicted, random_ids(1, 20, device=device), [20])
    with pytest.raises(RuntimeError, match="at most 20 tokens"):
        unevicted.crop(-21)
    unevicted.crop(-20)
    assert unevicted.get_seq_length() == 0


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova", "keydiff", "rkv", "random", "spectral"])
def test_every_policy_goes_on_after_a_crop(name: str, device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    policy = policies.create(name, budget=24, interval=8, window=8)
    cache = make_cache(model.config, policy)
    feed(model, cache, random_ids(1, 45, device=device), [40, *[1] * 5])
    cache.crop(-7)
    feed(model, cache, random_ids(1, 30, seed=4, device=device), [*[1] * 10, 20])
    assert cache.get_seq_length() == 68
    assert {layer.lengths for layer in cache.evicting_layers} == {(24,)}


def test_a_cache_is_croppable_where_the_newest_tokens_outlive_a_cut() -> None:
    config = make_config("llama")
    assert EvictingCache(config, policies.Full()).is_croppable
    assert EvictingCache(config, H2O).is_croppable
    assert not EvictingCache(config, policies.Random(budget=24, window=0)).is_croppable


# -- batch


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova", "keydiff", "rkv", "random", "spectral"])
def test_sequences_can_be_selected_and_repeated(name: str, device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    policy = policies.create(name, budget=24, interval=8, window=8)
    ids = random_ids(3, 80, device=device)
    mask = torch.ones(3, 80, dtype=torch.long, device=device)
    mask[2, :12] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)

    def run(cache: EvictingCache, rows: list[int], start: int, sizes: list[int]) -> torch.Tensor:
        logits = []
        for size in sizes:
            end = start + size
            with torch.no_grad():
                output = model(
                    ids[rows, start:end],
                    attention_mask=mask[rows, :end],
                    position_ids=position_ids[rows, start:end],
                    **cache_argument(cache),
                )
            logits.append(output.logits)
            start = end
        return torch.cat(logits, 1)

    cache = make_cache(model.config, policy)
    run(cache, [0, 1, 2], 0, [40])
    whole = make_cache(model.config, policy)
    run(whole, [0, 1, 2], 0, [40])
    cache.batch_select_indices(torch.tensor([2, 0], device=device))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 2, 3], device=device))  # sequences 2, 0, 0
    got = run(cache, [2, 0, 0], 40, [1] * 10 + [30])
    expected = run(whole, [0, 1, 2], 40, [1] * 10 + [30])[[2, 0, 0]]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_another_batch_size_is_refused(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, H2O)
    feed(model, cache, random_ids(2, 10, device=device), [10])
    message = r"layer 0: new keys must be .*64 \(2, 2, Q, 8\) .* got torch.float64 \(1, 2, 1, 8\)"
    with pytest.raises(ValueError, match=message):
        feed(model, cache, random_ids(1, 1, device=device), [1])
    with pytest.raises(ValueError, match=r"new keys must be torch\.float64 .* got torch\.float32"):
        feed(
            make_model("llama", dtype=torch.float32, device=device),
            cache,
            random_ids(2, 1, device=device),
            [1],
        )
    elsewhere = torch.empty(2, 2, 1, 8, dtype=torch.float64, device="meta")
    with pytest.raises(
        ValueError, match=rf"on {device}\S* as the cache holds them, got .* on meta"
    ):
        cache.layers[0].update(elsewhere, elsewhere)


# -- events


def test_events_tell_what_was_there_and_what_stays(device: str) -> None:
    model = make_model("llama", device=device)
    events: list[EvictionEvent] = []
    policy = policies.H2O(budget=24, interval=8, window=5, sinks=3)
    cache = make_cache(model.config, policy, on_evict=events.append)
    feed(model, cache, random_ids(2, 60, device=device), [50, *[1] * 10])
    assert [(event.layer, event.tokens_seen) for event in events] == [
        (0, 50), (1, 50), (0, 58), (1, 58),
    ]  # fmt: skip
    for event in events:
        size = 50 if event.tokens_seen == 50 else 32
        assert event.positions.shape == event.scores.shape == (2, 2, size)
        assert event.positions.dtype == torch.int32
        assert event.scores.dtype == torch.float32
        assert event.keep.dtype == torch.int32
        assert event.keep.shape == (2, 2, 24)
        kept = event.positions.gather(2, event.keep.long())
        assert kept[..., :3].tolist() == [[[0, 1, 2]] * 2] * 2
        newest = list(range(event.tokens_seen - 5, event.tokens_seen))
        assert kept[..., -5:].tolist() == [[newest] * 2] * 2
        # What was let go ranked no higher than what stayed by its score.
        for row in range(2):
            for head in range(2):
                free = event.keep[row, head, 3:-5].long()
                gone = [
                    slot
                    for slot in range(3, size - 5)
                    if slot not in event.keep[row, head].tolist()
                ]
                scores = event.scores[row, head]
                assert scores[gone].max() <= scores[free].min()


def test_a_policy_that_breaks_its_word_is_caught(device: str) -> None:
    class TooMany(policies.ScoreTracker):  # type: ignore[type-arg]
        def scores(self) -> torch.Tensor:
            raise NotImplementedError

        def keep(self) -> torch.Tensor | None:
            size = self._observed().keys.shape[2]
            return (
                None
                if size < 32
                else torch.arange(25, dtype=torch.int32, device=device).expand(1, 2, 25)
            )

    class Twice(TooMany):
        def keep(self) -> torch.Tensor | None:
            keep = super().keep()
            return (
                None
                if keep is None
                else keep[..., :24].clone().index_fill_(2, torch.tensor(3, device=device), 2)
            )

    for tracker, message in ((TooMany, "must be 24 a head, got 25"), (Twice, "ascending, unique")):

        class Broken(policies.H2O):
            def trackers(self, num_layers: int, made: type = tracker) -> list[policies.Tracker]:
                return [made(self) for _ in range(num_layers)]

        cache = make_cache(make_config("llama"), Broken(budget=24, interval=8))
        with pytest.raises(RuntimeError, match=message):
            feed(make_model("llama", device=device), cache, random_ids(1, 40, device=device), [40])


# -- what is refused


def test_bad_arguments() -> None:
    config = make_config("llama")
    with pytest.raises(TypeError, match=r"config must be a transformers configuration .* got dict"):
        EvictingCache({}, H2O)
    with pytest.raises(TypeError, match="policy must be a spectralkv Policy, got str"):
        EvictingCache(config, "h2o")
    with pytest.raises(ValueError, match="must be a decoder, got an encoder-decoder"):
        EvictingCache(T5Config(), H2O)
    with pytest.raises(ValueError, match=r"\[spectral\] budget must be at least .* got 20"):
        SpectralCache(config, budget=20)
    with pytest.raises(TypeError, match="colour"):
        SpectralCache(config, budget=100, colour="red")
    EvictingCache(BertConfig(is_decoder=True), H2O)


def test_models_that_share_keys_between_layers_are_refused() -> None:
    config = make_config("llama")
    config.kv_sharing_modes = ["store", "reuse"]
    with pytest.raises(ValueError, match="each layer must have its own keys and values"):
        EvictingCache(config, H2O)


def test_layers_that_would_share_a_mask_but_not_a_size_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(DynamicLayer):
        pass

    mixed = DynamicCache(config=make_config("llama"))
    mixed.layers[1] = Other()
    monkeypatch.setattr("spectralkv.hf.cache.DynamicCache", lambda config: mixed)  # noqa: ARG005
    with pytest.raises(ValueError, match="all be plain attention, got Other in layer 1"):
        EvictingCache(make_config("llama"), H2O)
    mixed.layers[0] = DynamicLayer()
    assert EvictingCache(make_config("llama"), policies.Full()).evicting_layers[0].index == 0


def test_flex_attention_is_refused_before_anything_runs(device: str) -> None:
    config = make_config("llama")
    config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"must be sdpa, eager or a flash .* got flex_attention"):
        EvictingCache(config, H2O)
    EvictingCache(config, policies.Full())
    model = make_model("llama", seed=7, device=device)
    cache = make_cache(model.config, H2O)
    model.config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(ValueError, match="got flex_attention"):
            feed(model, cache, random_ids(1, 10, device=device), [10])
    finally:
        model.config._attn_implementation = "sdpa"
    assert cache.get_seq_length() == 0


def test_attention_that_bypasses_the_tap_is_noticed(device: str) -> None:
    cache = make_cache(make_config("llama"), H2O)
    keys = torch.zeros(1, 2, 3, 8, device=device)
    cache.update(keys, keys, 0)
    with pytest.raises(RuntimeError, match="expected the keys of the last forward pass to reach"):
        cache.update(keys, keys, 0)
    cache.reset()
    cache.update(keys, keys, 0)
    full = make_cache(make_config("llama"), policies.Full())
    full.update(keys, keys, 0)
    full.update(keys, keys, 0)
    assert full.get_seq_length() == 6


# -- copies


@pytest.mark.parametrize("name", ["spectral", "h2o", "snapkv", "tova", "keydiff", "rkv", "random"])
def test_a_copy_lives_on_its_own(name: str, device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    cache = make_cache(model.config, policies.create(name, budget=24, interval=8, window=8))
    ids = random_ids(1, 90, device=device)
    feed(model, cache, ids[:, :45], [40, *[1] * 5])
    copied = copy.deepcopy(cache)
    one = feed(model, cache, ids[:, 45:], [1] * 45)
    other = feed(model, copied, ids[:, 45:], [1] * 45)
    assert torch.equal(one, other)
    assert copied.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()


# -- importing


def test_importing_patches_nothing_and_the_package_needs_no_torch() -> None:
    code = """
import sys
import spectralkv
assert "torch" not in sys.modules, "import spectralkv imported torch"
from transformers.modeling_utils import AttentionInterface
before = AttentionInterface.get_interface
import spectralkv.hf, spectralkv.policies
assert AttentionInterface.get_interface is before, "importing patched transformers"
from transformers import LlamaConfig
spectralkv.hf.EvictingCache(LlamaConfig(), spectralkv.policies.Full())
assert AttentionInterface.get_interface is before, "a full cache patched transformers"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
