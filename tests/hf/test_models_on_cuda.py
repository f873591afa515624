"""Caches of models on CUDA: the same choices as on the CPU, and nothing that waits."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import feed, make_cache
from test_generation import POLICIES, generate, left_padded

import spectralkv
from spectralkv import policies
from spectralkv.hf import EvictingCache, EvictingLayer, EvictionEvent, SpectralCache, cache_argument
from tiny_models import FAMILIES, implementations, make_model, random_ids

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

WALK = policies.Spectral(budget=24, interval=8, window=6, sinks=2)
ALL = POLICIES | {"spectral_walk": WALK, "full": policies.Full()}


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Make torch refuse whatever would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tokens_and_cuts_are_those_of_the_cpu(name: str, implementation: str) -> None:
    """In float32: its rounding differs between devices, too little to change a choice here."""
    ids = random_ids(1, 60)
    outputs, events = [], []
    for device in ("cpu", "cuda"):
        model = make_model("llama", implementation, torch.float32, device=device)
        seen: list[EvictionEvent] = []
        cache = make_cache(model.config, ALL[name], on_evict=seen.append)
        outputs.append(generate(model, ids.to(device), cache).tolist())
        events.append(seen)
    assert outputs[0] == outputs[1]
    assert len(events[0]) == len(events[1])
    for ours, theirs in zip(*events, strict=True):
        assert theirs.keep.is_cuda
        assert torch.equal(ours.keep, theirs.keep.cpu())
        assert torch.equal(ours.positions, theirs.positions.cpu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    model = make_model("llama", dtype=dtype, device="cuda")
    cache = make_cache(model.config, ALL[name])
    output = generate(model, random_ids(2, 60, device="cuda"), cache)
    assert output.shape == (2, 100)
    if name != "full":
        assert {layer.lengths for layer in cache.evicting_layers} == {(31, 31)}
    assert cache.evicting_layers[0].keys.dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_bitsandbytes(bits: int, tmp_path: Path) -> None:
    """Weights in few bits give keys in many: the cache is as with any other model."""
    linear = pytest.importorskip("bitsandbytes").nn
    kind = linear.Linear4bit if bits == 4 else linear.Linear8bitLt
    made = make_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    made.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        device_map={"": 0},
        dtype=torch.bfloat16,
    )
    assert isinstance(model.model.layers[0].self_attn.k_proj, kind)
    ids = random_ids(2, 60, device="cuda")
    expected = generate(model, ids, transformers.DynamicCache(config=model.config))
    assert torch.equal(generate(model, ids, make_cache(model.config, policies.Full())), expected)
    cache = make_cache(model.config, WALK)
    assert generate(model, ids, cache).shape == expected.shape
    assert {layer.lengths for layer in cache.evicting_layers} == {(31, 31)}
    assert cache.stats().evictions > 0


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, name) for family in FAMILIES for name in implementations(family)],
)
def test_every_family_with_spectral(family: str, implementation: str) -> None:
    model = make_model(family, implementation, torch.bfloat16, device="cuda")
    cache = make_cache(model.config, WALK)
    assert generate(model, random_ids(2, 70, device="cuda"), cache).shape == (2, 110)
    assert cache.stats().evictions > 0
    assert cache.stats().graph_bytes > 0


def test_keys_are_read_from_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", dtype=torch.bfloat16, device="cuda")
    cache = make_cache(model.config, WALK)
    read: list[int] = []
    on_step = spectralkv.Monitor.on_step

    def spy(self: Any, layer: int, query: Any, keys: Any, **options: Any) -> None:
        read.append(keys.data_ptr())
        on_step(self, layer, query, keys, **options)

    monkeypatch.setattr(spectralkv.Monitor, "on_step", spy)
    feed(model, cache, random_ids(1, 40, device="cuda"), [40])
    slabs = [layer.keys.data_ptr() for layer in cache.evicting_layers]
    feed(model, cache, random_ids(1, 30, device="cuda"), [1] * 30)
    assert read == slabs * 30


def test_a_cache_waits_for_nothing_that_torch_knows_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", dtype=torch.float32, device="cuda")
    cache = make_cache(model.config, WALK)
    ids = random_ids(2, 90, device="cuda")
    feed(model, cache, ids[:, :50], [50])
    # What the model itself does in between is not ours to judge.
    for name in ("update", "before_attention", "after_attention"):
        monkeypatch.setattr(EvictingLayer, name, no_waits()(getattr(EvictingLayer, name)))
    feed(model, cache, ids[:, 50:], [1] * 40)  # with five cuts
    assert cache.stats().evictions == 2 * 6


def test_models_in_two_threads_on_two_streams() -> None:
    jobs = [
        (make_model("llama", dtype=torch.float32, device="cuda"), random_ids(1, 60, device="cuda")),
        (make_model("qwen3", dtype=torch.float32, device="cuda"), random_ids(2, 45, device="cuda")),
    ]
    expected = [generate(model, ids, make_cache(model.config, WALK)) for model, ids in jobs]
    results: list[Any] = [None, None]
    torch.cuda.synchronize()

    def work(job: int) -> None:
        model, ids = jobs[job]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results[job] = generate(model, ids, make_cache(model.config, WALK))
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(job,)) for job in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def split_model() -> Any:
    """A model on the first device, and its like with a layer on each of two."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    accelerate = pytest.importorskip("accelerate")
    whole = make_model("llama", dtype=torch.float32, seed=9, device="cuda")
    placed = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    placed |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    return whole, accelerate.dispatch_model(copy.deepcopy(whole), device_map=placed)


@pytest.mark.parametrize("attention", ["model", "policy"])
@pytest.mark.parametrize("lengths", [(60, 60), (60, 45)])
def test_layers_on_several_devices(
    attention: str, lengths: tuple[int, int], split_model: Any
) -> None:
    """A device map: each layer's graph lies where its keys are."""
    ids, mask = left_padded(list(lengths), "cuda")
    outputs, caches = [], []
    for model in split_model:
        caches.append(make_cache(model.config, WALK, attention=attention))
        outputs.append(generate(model, ids, caches[-1], attention_mask=mask))
    assert torch.equal(*outputs)
    for ours, theirs in zip(*(cache.evicting_layers for cache in caches), strict=True):
        assert torch.equal(ours.positions().cpu(), theirs.positions().cpu())
    assert [layer.keys.device.index for layer in caches[1].evicting_layers] == [0, 1]
    one, other = (replace(cache.stats(), graph_bytes=0) for cache in caches)
    assert one == other


def test_a_decode_loop_over_several_devices(split_model: Any) -> None:
    ids = random_ids(2, 60, device="cuda")
    whole, split = split_model
    expected = generate(whole, ids, make_cache(whole.config, WALK, attention="policy"))
    caches = [make_cache(split.config, WALK, attention="policy") for _ in range(2)]
    got = spectralkv.hf.generate(split, ids, caches[0], max_new_tokens=40)
    assert torch.equal(got, expected)
    assert caches[0].stats().evictions > 0
    refusal = r"a model on one CUDA device, got \['cuda:0', 'cuda:1'\]"
    with pytest.raises(ValueError, match=refusal):
        spectralkv.hf.generate(split, ids, caches[1], max_new_tokens=40, capture=True)


def test_a_cache_on_several_devices_is_saved(split_model: Any, tmp_path: Path) -> None:
    _, model = split_model
    cache = make_cache(model.config, WALK)
    ids = generate(model, random_ids(1, 60, device="cuda"), cache)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    devices = [layer.keys.device for layer in cache.evicting_layers]
    loaded = EvictingCache.load(path, model.config, device=devices, attention="model")
    ids = torch.cat((ids, random_ids(1, 10, seed=3, device="cuda")), 1)
    assert torch.equal(generate(model, ids, loaded), generate(model, ids, cache))
    loaded = EvictingCache.load(path, model.config, device="cuda:0", attention="model")
    with pytest.raises(ValueError, match=r"layer 1: .* on cuda:0 as .* got .* on cuda:1"):
        generate(model, ids, loaded)


def test_a_loop_is_captured_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    model = make_model("llama", dtype=torch.float32, device="cuda:1")
    ids = random_ids(2, 60, device="cuda:1")
    caches = [make_cache(model.config, WALK, attention="policy") for _ in range(2)]
    ends = {"eos_token_id": 1}  # so that the host looks at tokens on their way
    expected = generate(model, ids, caches[0], **ends)
    got = spectralkv.hf.generate(model, ids, caches[1], max_new_tokens=40, capture=True, **ends)
    assert torch.equal(got, expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model(demo_model: Any, dtype: torch.dtype) -> None:
    model = demo_model.model
    text = "The keeper of the lighthouse wrote the name of each boat into his ledger. " * 12
    ids = demo_model.tokenizer(text, return_tensors="pt").input_ids
    try:
        model.to("cuda", dtype)
        cache = SpectralCache(model.config, budget=96, interval=16)
        output = model.generate(
            ids.cuda(), **cache_argument(cache), max_new_tokens=24, do_sample=False
        )
    finally:
        model.to("cpu", torch.float32)
    stats = cache.stats()
    assert 96 <= stats.tokens_kept < 112
    assert stats.evictions > 0
    assert "lighthouse" in demo_model.tokenizer.decode(output[0, ids.shape[1] :])
