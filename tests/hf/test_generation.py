"""Everything that generate() does to a cache."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from helpers import make_cache
from transformers import DynamicCache

from spectralkv import policies
from spectralkv.hf import SpectralCache, cache_argument
from tiny_models import make_model, random_ids

SHARED = {"budget": 24, "interval": 8}
POLICIES = {
    "h2o": policies.H2O(**SHARED),
    "snapkv": policies.SnapKV(**SHARED, window=10),
    "tova": policies.TOVA(**SHARED),
    "streaming_llm": policies.StreamingLLM(**SHARED, window=10),
    "keydiff": policies.KeyDiff(**SHARED),
    "rkv": policies.RKV(**SHARED),
    "random": policies.Random(**SHARED, window=4, sinks=2),
    "spectral": policies.Spectral(**SHARED, window=6, sinks=2, solver="exact"),
}


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    defaults = {"max_new_tokens": 40, "do_sample": False}
    return model.generate(ids, **cache_argument(cache), **(defaults | options))


def test_models_take_a_cache_without_a_warning() -> None:
    model, ids = make_model("llama"), random_ids(1, 12)
    for cache in (make_cache(model.config, POLICIES["h2o"]), DynamicCache(config=model.config)):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            model(ids[:, :8], **cache_argument(cache))
            generate(model, ids, cache, max_new_tokens=2)
        assert cache.get_seq_length() == 13


def left_padded(lengths: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, device=device)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("name", POLICIES)
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(name: str, device: str) -> None:
    dtype = torch.float32 if name == "spectral" else torch.float64
    model = make_model("llama", dtype=dtype, device=device)
    lengths = [10, 70, 31, 33, 24]
    ids, mask = left_padded(lengths, device=device)
    cache = make_cache(model.config, POLICIES[name])
    together = generate(model, ids, cache, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = make_cache(model.config, POLICIES[name])
        own = generate(model, ids[row : row + 1, -length:], alone)
        assert together[row, -40:].tolist() == own[0, -40:].tolist()
        assert alone.evicting_layers[0].lengths[0] == cache.evicting_layers[0].lengths[row]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefill_in_chunks_by_generate(implementation: str, device: str) -> None:
    model = make_model("llama", implementation, device=device)
    cache = make_cache(model.config, POLICIES["snapkv"])
    generate(model, random_ids(2, 75, device=device), cache, prefill_chunk_size=16)
    stats = cache.stats()
    assert stats.tokens_seen == 75 + 39
    assert 24 <= stats.tokens_kept < 32
    newest = cache.evicting_layers[0].positions()[:, :, -10:]
    assert newest.tolist() == [[list(range(104, 114))] * 2] * 2


def test_beams_follow_their_sequences(device: str) -> None:
    model = make_model("llama", device=device)
    ids = random_ids(2, 30, device=device)
    options = {"num_beams": 3, "max_new_tokens": 30}
    expected = generate(model, ids, DynamicCache(config=model.config), **options)
    unevicted = make_cache(model.config, policies.H2O(budget=200))
    assert torch.equal(generate(model, ids, unevicted, **options), expected)
    cache = make_cache(model.config, POLICIES["h2o"])
    together = generate(model, ids, cache, **options)
    assert cache.stats().evictions > 0
    for row in range(2):
        own = make_cache(model.config, POLICIES["h2o"])
        assert torch.equal(generate(model, ids[row : row + 1], own, **options)[0], together[row])


@pytest.mark.parametrize("name", POLICIES)
def test_beams_with_every_policy(name: str, device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    cache = make_cache(model.config, POLICIES[name])
    output = generate(
        model, random_ids(1, 40, device=device), cache, num_beams=2, max_new_tokens=20
    )
    assert output.shape == (1, 60)
    assert cache.evicting_layers[0].lengths == (27, 27)


def test_num_return_sequences(device: str) -> None:
    model = make_model("llama", device=device)
    ids = random_ids(1, 45, device=device)
    cache = make_cache(model.config, POLICIES["tova"])
    torch.manual_seed(5)
    output = generate(model, ids, cache, do_sample=True, num_return_sequences=3)
    assert output.shape == (3, 85)
    assert len(cache.evicting_layers[0].lengths) == 3
    greedy = generate(
        model, ids, make_cache(model.config, POLICIES["tova"]), num_beams=3, num_return_sequences=3
    )
    assert greedy.shape == (3, 85)


def repetitive_ids(device: str) -> torch.Tensor:
    return torch.cat([random_ids(1, 12, device=device)] * 5, 1)


@pytest.mark.parametrize("draft", ["prompt_lookup", "assistant"])
def test_speculation_without_eviction_changes_nothing(draft: str, device: str) -> None:
    model = make_model("llama", device=device)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if draft == "assistant":
        options = {"assistant_model": make_model("llama", seed=1, device=device)}
    expected = generate(model, repetitive_ids(device=device), DynamicCache(config=model.config))
    cache = make_cache(model.config, policies.H2O(budget=300))
    assert torch.equal(generate(model, repetitive_ids(device=device), cache, **options), expected)


@pytest.mark.parametrize("name", POLICIES)
def test_speculation_with_eviction(name: str, device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    cache = make_cache(model.config, POLICIES[name])
    if POLICIES[name].protected_window == 0:  # a draft's tokens may be evicted at once
        # transformers asks before the first draft from 5.24 on, and finds out by itself before.
        refusal = r"\[crop\] layer 0: at most \d+ tokens|requires a cache that can be cropped"
        with pytest.raises((RuntimeError, ValueError), match=refusal):
            generate(model, repetitive_ids(device=device), cache, prompt_lookup_num_tokens=4)
        return
    output = generate(model, repetitive_ids(device=device), cache, prompt_lookup_num_tokens=4)
    assert output.shape == (1, 100)
    for layer in cache.evicting_layers:
        newest = layer.positions()[0, 0, -2:].tolist()
        assert newest == [97, 98]
    assert cache.get_seq_length() == 99


def test_an_assistant_may_have_an_evicting_cache_beside_it(device: str) -> None:
    model, assistant = (
        make_model("llama", device=device),
        make_model("llama", seed=1, device=device),
    )
    cache = make_cache(model.config, POLICIES["snapkv"])
    output = generate(model, random_ids(1, 40, device=device), cache, assistant_model=assistant)
    assert output.shape == (1, 80)
    assert cache.stats().tokens_kept < 32


def test_two_turns(device: str) -> None:
    model = make_model("llama", device=device)
    cache = make_cache(model.config, POLICIES["h2o"])
    first = generate(model, random_ids(1, 50, device=device), cache, max_new_tokens=10)
    prompt = torch.cat((first, random_ids(1, 20, seed=9, device=device)), 1)
    second = generate(model, prompt, cache, max_new_tokens=10)
    assert second[:, :80].tolist() == prompt.tolist()
    assert cache.get_seq_length() == 89
    # The same, with the second turn fed by hand.
    other = make_cache(model.config, POLICIES["h2o"])
    generate(model, random_ids(1, 50, device=device), other, max_new_tokens=10)
    with torch.no_grad():
        logits = model(prompt[:, 59:], **cache_argument(other)).logits
    assert int(logits[0, -1].argmax()) == int(second[0, 80])


def test_two_models_in_two_threads(device: str) -> None:
    jobs = [
        (make_model("llama", device=device), POLICIES["h2o"], random_ids(1, 60, device=device)),
        (
            make_model("qwen3", device=device),
            POLICIES["snapkv"],
            random_ids(2, 45, seed=2, device=device),
        ),
    ]
    expected = [
        generate(model, ids, make_cache(model.config, policy)) for model, policy, ids in jobs
    ]
    results: list[list[torch.Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(job: int) -> None:
        model, policy, ids = jobs[job]
        start.wait()
        for _ in range(3):
            results[job].append(generate(model, ids, make_cache(model.config, policy)))

    threads = [threading.Thread(target=work, args=(job,)) for job in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert len(got) == 3
        assert all(torch.equal(output, wanted) for output in got)


def test_one_policy_serves_many_caches(device: str) -> None:
    model = make_model("llama", device=device)
    policy = POLICIES["h2o"]
    ids = [random_ids(1, 50, seed=seed, device=device) for seed in range(2)]
    caches = [make_cache(model.config, policy) for _ in range(2)]
    alone = [generate(model, one, make_cache(model.config, policy)) for one in ids]
    with torch.no_grad():  # interleaved, token by token
        outputs = [
            model(one, **cache_argument(cache)) for one, cache in zip(ids, caches, strict=True)
        ]
        tokens = [[output.logits[:, -1:].argmax(-1)] for output in outputs]
        for _ in range(39):
            for job, cache in enumerate(caches):
                output = model(tokens[job][-1], **cache_argument(cache))
                tokens[job].append(output.logits[:, -1:].argmax(-1))
    for job in range(2):
        assert torch.cat(tokens[job], 1).tolist() == alone[job][:, 50:].tolist()


def test_a_reset_cache_is_new(device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    for name, policy in POLICIES.items():
        cache = make_cache(model.config, policy)
        first = generate(model, random_ids(1, 50, device=device), cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.stats().kv_bytes == 0
        assert cache.stats().evictions == 0
        again = generate(model, random_ids(1, 50, device=device), cache)
        assert torch.equal(first, again), name
        cache.reset()
        assert generate(model, random_ids(3, 40, device=device), cache).shape == (
            3,
            80,
        )  # another batch size


def test_inference_mode_may_come_and_go(device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    ids = random_ids(1, 60, device=device)
    for policy in POLICIES.values():
        cache = make_cache(model.config, policy)
        with torch.inference_mode():
            model(ids[:, :40], **cache_argument(cache))
        with torch.no_grad():
            model(ids[:, 40:50], **cache_argument(cache))
        with torch.inference_mode():
            model(ids[:, 50:51], **cache_argument(cache))
        model(ids[:, 51:], **cache_argument(cache))  # with gradients: they stop at the cache
        assert cache.stats().tokens_kept < 32
        assert not cache.evicting_layers[0].keys.requires_grad


def test_inference_mode_may_come_and_go_with_padding(device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    ids, mask = left_padded([60, 45, 33], device=device)
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    for policy in POLICIES.values():
        cache = make_cache(model.config, policy)
        for mode, start, end in (
            (torch.inference_mode(), 0, 29),
            (torch.no_grad(), 29, 40),
            (torch.inference_mode(), 40, 59),
            (torch.enable_grad(), 59, 60),
        ):
            with mode:
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=position_ids[:, start:end],
                    **cache_argument(cache),
                )
        assert cache.evicting_layers[0].lengths == (25, 25, 25)
        with torch.inference_mode():
            cache.crop(0)
            cache.reorder_cache(torch.tensor([2, 0, 1], device=device))
        cache.batch_select_indices(torch.tensor([1], device=device))
        with torch.no_grad():
            model(ids[:1, -1:], **cache_argument(cache))


def test_spectral_cache_takes_options_and_a_seed(device: str) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    options = {"budget": 24, "interval": 8, "window": 4, "sinks": 2, "top_k": 4}
    outputs = [
        generate(
            model,
            random_ids(1, 90, device=device),
            SpectralCache(model.config, **options, seed=seed),
        )
        for seed in (0, 0)
    ]
    assert torch.equal(*outputs)
    cache = SpectralCache(model.config, **options, preset="uniform32")
    generate(model, random_ids(1, 90, device=device), cache)
    assert cache.stats().policy == "spectral"
    assert cache.stats().graph_bytes > 0
