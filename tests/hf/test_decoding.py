"""The lean decode loop gives what generate() gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import feed, make_cache

from spectralkv import policies
from spectralkv.hf import (
    DecodeLoop,
    EvictingCache,
    EvictionEvent,
    Sampling,
    cache_argument,
    generate,
    one_stream,
)
from spectralkv.hf.streams import capture_stream
from tiny_models import implementations, make_model, random_ids

SPECTRAL = policies.Spectral(budget=24, interval=8, window=6, sinks=2)
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3")


def model_of(family: str = "llama", **options: Any) -> Any:
    return make_model(family, implementations(family)[0], dtype=torch.float32, **options)


def cache_of(model: Any, policy: policies.Policy = SPECTRAL, **options: Any) -> EvictingCache:
    return make_cache(model.config, policy, attention="policy", **options)


def left_padded(lengths: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, device=device)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths])
    return ids, mask.to(device, torch.int64)


def theirs(model: Any, ids: torch.Tensor, cache: EvictingCache, **options: Any) -> torch.Tensor:
    defaults = {"max_new_tokens": 60, "do_sample": False}
    return model.generate(ids, **cache_argument(cache), **(defaults | options))


def same_state(one: EvictingCache, other: EvictingCache) -> bool:
    # Without a budget the loop makes room for what is to come, generate() bit by bit.
    stats = [replace(cache.stats(), kv_bytes=0, graph_bytes=0) for cache in (one, other)]
    return stats[0] == stats[1] and all(
        a.lengths == b.lengths and torch.equal(a.positions(), b.positions())
        for a, b in zip(one.evicting_layers, other.evicting_layers, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_of_generate(family: str, batch: int, device: str) -> None:
    model = model_of(family, device=device)
    ids = random_ids(batch, 50, device=device)
    caches = [cache_of(model) for _ in range(2)]
    expected = theirs(model, ids, caches[0])
    assert torch.equal(generate(model, ids, caches[1], max_new_tokens=60), expected)
    assert same_state(*caches)
    assert caches[0].stats() == caches[1].stats()
    assert caches[0].stats().evictions >= 8


@pytest.mark.parametrize(
    "policy",
    [
        policies.Spectral(budget=None),
        policies.Spectral(budget=24, interval=1, window=6, sinks=2, solver="exact"),
        policies.Spectral(budget=40, interval=16, window=6, sinks=2, scope="layer"),
        policies.Spectral(budget=200, interval=8),
        policies.Spectral(budget=24, interval=8, window=6, sinks=2, walk_interval=5),
    ],
)
def test_policies_of_all_kinds(policy: policies.Policy, device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 30, device=device)
    caches = [cache_of(model, policy) for _ in range(2)]
    expected = theirs(model, ids, caches[0])
    assert torch.equal(generate(model, ids, caches[1], max_new_tokens=60), expected)
    assert same_state(*caches)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_left_padded_batch(family: str, device: str) -> None:
    model = model_of(family, device=device)
    ids, mask = left_padded([10, 70, 31, 33, 24], device)
    caches = [cache_of(model) for _ in range(2)]
    expected = theirs(model, ids, caches[0], attention_mask=mask)
    got = generate(model, ids, caches[1], attention_mask=mask, max_new_tokens=60)
    assert torch.equal(got, expected)
    assert same_state(*caches)
    with pytest.raises(ValueError, match="padding must be on the left"):
        generate(model, ids, cache_of(model), attention_mask=mask.flip(1))


def ends_early(model: Any, ids: torch.Tensor, steps: int) -> list[int]:
    """Tokens that end each sequence at its own step, `steps` at the latest."""
    output = theirs(model, ids, cache_of(model))[:, ids.shape[1] :]
    return [int(row[steps - 3 * i]) for i, row in enumerate(output)]


@pytest.mark.parametrize("steps", [1, 13, 38])
def test_sequences_end_when_theirs_do(steps: int, device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 30, device=device)
    eos = ends_early(model, ids, max(steps, 3))
    caches = [cache_of(model) for _ in range(2)]
    expected = theirs(model, ids, caches[0], eos_token_id=eos, pad_token_id=0)
    got = generate(model, ids, caches[1], eos_token_id=eos, pad_token_id=0, max_new_tokens=60)
    assert torch.equal(got, expected)
    assert got.shape[1] < 90
    assert caches[1].get_seq_length() == caches[0].get_seq_length()
    # Another turn finds a cache that holds no more than was said.
    more = torch.cat((got, random_ids(2, 9, seed=3, device=device)), 1)
    assert generate(model, more, caches[1], max_new_tokens=5).shape[1] == more.shape[1] + 5


def test_policies_without_a_window_end_in_time(device: str) -> None:
    model = model_of(device=device)
    policy = policies.Spectral(budget=24, interval=2, window=0, sinks=2)
    ids = random_ids(1, 30, device=device)
    output = theirs(model, ids, cache_of(model, policy))
    eos = int(output[0, 30 + 20])
    caches = [cache_of(model, policy) for _ in range(2)]
    expected = theirs(model, ids, caches[0], eos_token_id=eos)
    assert torch.equal(generate(model, ids, caches[1], eos_token_id=eos), expected[:, :50])


class Collector:
    def __init__(self) -> None:
        self.put_in: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.put_in.append(value.clone())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("ends", [False, True])
def test_streamers_get_each_token_once(ends: bool, device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(1, 30, device=device)
    eos = [ends_early(model, ids, 13)[0]] if ends else None
    streamer = Collector()
    output = generate(
        model, ids, cache_of(model), eos_token_id=eos, streamer=streamer, max_new_tokens=40
    )
    assert streamer.ended
    assert torch.equal(streamer.put_in[0], ids.cpu())
    assert torch.cat(streamer.put_in[1:]).tolist() == output[0, 30:].tolist()


def test_turns_and_prompts_in_chunks(device: str) -> None:
    model = model_of(device=device)
    caches = [cache_of(model) for _ in range(2)]
    first = theirs(model, random_ids(1, 75, device=device), caches[0], prefill_chunk_size=16)
    prompt = torch.cat((first, random_ids(1, 20, seed=9, device=device)), 1)
    got = generate(
        model,
        random_ids(1, 75, device=device),
        caches[1],
        prefill_chunk_size=16,
        max_new_tokens=60,
    )
    assert torch.equal(got, first)
    # Without a mask generate() would take a token that is the padding's for padding.
    expected = theirs(model, prompt, caches[0], attention_mask=torch.ones_like(prompt))
    assert torch.equal(generate(model, prompt, caches[1], max_new_tokens=60), expected)
    with pytest.raises(ValueError, match="tokens that the cache has not seen, got 10 of which"):
        generate(model, prompt[:, :10], caches[1])
    with pytest.raises(ValueError, match="prefill_chunk_size must be 1 or more, got 0"):
        generate(model, prompt, cache_of(model), prefill_chunk_size=0)


def test_after_a_loop_any_forward_pass_goes(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 90, device=device)
    logits = []
    for run in (theirs, lambda model, ids, cache: generate(model, ids, cache, max_new_tokens=60)):
        cache = cache_of(model)
        run(model, ids[:, :40], cache)
        cache.crop(-3)
        logits.append(feed(model, cache, ids[:, 40:], [1, 7, 1, 1, 20, *[1] * 20]))
    assert torch.equal(*logits)


def test_cuts_are_announced(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 30, device=device)
    lists: list[list[EvictionEvent]] = [[], []]
    theirs(model, ids, cache_of(model, on_evict=lists[0].append))
    generate(model, ids, cache_of(model, on_evict=lists[1].append), max_new_tokens=60)
    assert len(lists[1]) == len(lists[0]) > 0
    for one, other in zip(*lists, strict=True):
        assert (one.layer, one.tokens_seen) == (other.layer, other.tokens_seen)
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.keep, other.keep)


def test_sampling_follows_its_options(device: str) -> None:
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]], device=device).repeat(20_000, 1)

    def frequencies(**options: Any) -> torch.Tensor:
        sampling = Sampling(do_sample=True, generator=generator, **options)
        return sampling.choose(logits).bincount(minlength=5).double().cpu() / len(logits)

    def expected(kept: list[int], temperature: float = 1.0) -> torch.Tensor:
        one = (logits[0].double().cpu() / temperature).softmax(-1)
        mask = torch.zeros(5, dtype=torch.double)
        mask[kept] = 1.0
        return one * mask / (one * mask).sum()

    for options, wanted in (
        ({}, expected([0, 1, 2, 3, 4])),
        ({"temperature": 2.0}, expected([0, 1, 2, 3, 4], 2.0)),
        ({"top_k": 2}, expected([2, 3])),
        ({"top_p": 0.7}, expected([2, 3])),
        ({"top_p": 0.01}, expected([3])),
        ({"top_k": 1}, expected([3])),
    ):
        got = frequencies(**options)
        assert (got[wanted == 0] == 0).all()
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.015)
    assert Sampling().choose(logits[:2]).tolist() == [3, 3]
    for options, said in (
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            Sampling(do_sample=True, **options)


def test_sampled_text_repeats_with_its_seed(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 40, device=device)
    outputs = []
    for seed in (1, 1, 2):
        sampling = Sampling(
            do_sample=True, top_k=20, generator=torch.Generator(device).manual_seed(seed)
        )
        outputs.append(generate(model, ids, cache_of(model), sampling=sampling, max_new_tokens=40))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def loop_of(model: Any, cache: EvictingCache, device: str, **options: Any) -> DecodeLoop:
    ids = random_ids(2, 30, device=device)
    logits = feed(model, cache, ids, [30])[:, -1]
    positions = torch.full((2,), 30, device=device)
    return DecodeLoop(
        model, cache, logits=logits, positions=positions, max_new_tokens=50, **options
    )


def test_a_loop_goes_on_where_it_stopped(device: str) -> None:
    model = model_of(device=device)
    expected = theirs(model, random_ids(2, 30, device=device), cache_of(model), max_new_tokens=50)
    loop = loop_of(model, cache_of(model), device)
    for steps in (7, 0, 20, 22):
        loop.run(steps)
    assert loop.count == 50
    assert torch.equal(loop.tokens, expected[:, 30:])
    assert not loop.finished.any()
    with pytest.raises(ValueError, match=r"steps must be 0 to 0 .* got 1"):
        loop.run(1)


def test_what_cannot_be_decoded_says_so(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 30, device=device)
    others = (
        make_cache(model.config, policies.H2O(budget=24, interval=8)),
        make_cache(model.config, SPECTRAL, attention="model"),
    )
    for cache in others:
        with pytest.raises(ValueError, match=r"\[decode\] expected a cache whose policy attends"):
            generate(model, ids, cache)
    logits, positions = torch.zeros(2, 97, device=device), torch.zeros(2, device=device)
    loop = DecodeLoop(model, cache_of(model), logits=logits, positions=positions, max_new_tokens=5)
    with pytest.raises(ValueError, match="layer 0: expected a prompt before the steps"):
        loop.run(1)
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, got 0"):
        generate(model, ids, cache_of(model), max_new_tokens=0)
    assert generate(model, ids, cache_of(model), max_new_tokens=1).shape == (2, 31)


def test_half_precision_goes_as_well(device: str) -> None:
    model = make_model("llama", dtype=torch.bfloat16, device=device)
    ids = random_ids(2, 30, device=device)
    assert generate(model, ids, cache_of(model), max_new_tokens=50).shape == (2, 80)


def test_a_loop_that_broke_off_leaves_a_cache_to_be_reset(device: str) -> None:
    model = model_of(device=device)
    cache = cache_of(model)
    loop = loop_of(model, cache, device, capture=False)

    def stop() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(9, stop)
    with pytest.raises(RuntimeError, match=r"After an interruption, reset\(\) the cache"):
        feed(model, cache, random_ids(2, 1, device=device), [1])
    cache.reset()
    assert feed(model, cache, random_ids(2, 30, device=device), [30]).shape == (2, 30, 97)


class Replayed(DecodeLoop):
    """Replays as the device does, of which Python sees nothing: nothing is counted."""

    def _may_capture(self, capture: bool | None) -> bool:  # noqa: ARG002
        return True

    def _captured(self, work: Any) -> Any:
        self.captures = getattr(self, "captures", 0) + 1
        return type("Graph", (), {"replay": staticmethod(work)})()


def test_replays_are_counted_like_calls() -> None:
    model = model_of()
    expected = cache_of(model)
    theirs(model, random_ids(2, 30), expected, max_new_tokens=50)
    cache = cache_of(model)
    ids = random_ids(2, 30)
    logits = feed(model, cache, ids, [30])[:, -1]
    loop = Replayed(model, cache, logits=logits, positions=torch.full((2,), 30), max_new_tokens=100)
    loop.run(49)
    assert loop.is_captured
    assert loop.captures == 2  # the step, and the cut
    assert same_state(cache, expected)
    cache.crop(-2)  # moves nothing: the captures hold
    loop.run(10)
    assert loop.captures == 2
    cache.reorder_cache(torch.tensor([1, 0]))  # new slabs
    loop.run(20)
    assert loop.captures == 4


def test_a_capture_needs_cuda() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"capture=True expected a model on one CUDA device"):
        generate(model, random_ids(1, 30), cache_of(model), capture=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_steps_are_those_of_generate(batch: int) -> None:
    model = model_of(device="cuda")
    ids = random_ids(batch, 50, device="cuda")
    caches = [cache_of(model) for _ in range(2)]
    expected = theirs(model, ids, caches[0], max_new_tokens=120)
    got = generate(model, ids, caches[1], max_new_tokens=120, capture=True)
    assert torch.equal(got, expected)
    assert same_state(*caches)
    loop = loop_of(model, cache_of(model), "cuda", capture=True)
    loop.run(40)
    assert loop.is_captured


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_on_one_stream_a_loop_is_captured_where_all_else_runs() -> None:
    model = model_of(device="cuda")
    ids = random_ids(2, 50, device="cuda")
    expected = theirs(model, ids, cache_of(model))
    device, default = torch.device("cuda"), torch.cuda.default_stream()
    with one_stream("cuda"):
        stream = torch.cuda.current_stream()
        assert stream != default
        assert capture_stream(device) == stream
        with one_stream(device):
            assert torch.cuda.current_stream() == stream
            got = generate(model, ids, cache_of(model), max_new_tokens=60, capture=True)
        assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_stream() == default
    assert capture_stream(device) == stream  # the default one cannot be captured
    assert torch.equal(got, expected)


def test_elsewhere_there_are_no_streams() -> None:
    model = model_of()
    ids = random_ids(1, 50)
    expected = generate(model, ids, cache_of(model), max_new_tokens=10)
    with one_stream("cpu"):
        assert torch.equal(generate(model, ids, cache_of(model), max_new_tokens=10), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_captures_refuse_what_the_host_decides() -> None:
    model = model_of(device="cuda")
    policy = policies.Spectral(budget=24, interval=8, window=6, sinks=2, walk_interval=5)
    with pytest.raises(ValueError, match="capture=True expected walk_interval=0, got 5"):
        loop_of(model, cache_of(model, policy), "cuda", capture=True)
    mixed = model_of("gemma3", device="cuda")
    with pytest.raises(ValueError, match="expected layers that all evict, got 2 of another kind"):
        loop_of(mixed, cache_of(mixed), "cuda", capture=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_captured_sampling_repeats_with_its_seed() -> None:
    model = model_of(device="cuda")
    outputs = []
    for capture in (True, True):
        sampling = Sampling(do_sample=True, generator=torch.Generator("cuda").manual_seed(3))
        outputs.append(
            generate(
                model,
                random_ids(2, 40, device="cuda"),
                cache_of(model),
                sampling=sampling,
                max_new_tokens=40,
                capture=capture,
            )
        )
    assert torch.equal(*outputs)
