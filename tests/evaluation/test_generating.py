"""Generation: the same tokens as transformers, whole characters, honest figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from spectralkv.evaluation import (
    CacheSettings,
    EvaluationError,
    LoadedModel,
    PolicySpec,
    Sampling,
    create_cache,
    create_policy,
    generate,
    generation,
)
from spectralkv.evaluation.generation import (
    TextPieces,
    continue_text,
    decode,
    prefill,
    token_pieces,
)
from spectralkv.hf import DecodeLoop, EvictingCache
from tiny_text import make_loaded, make_text, make_tokenizer

SETTINGS = CacheSettings(interval=16, window=10, sinks=2)


def run(tiny: LoadedModel, name: str, sampling: Sampling, **options: Any) -> Any:
    policy = create_policy(PolicySpec(name=name), None if name == "full" else 64, SETTINGS)
    tokens = tiny.tokenizer.encode(make_text(200))
    cache = create_cache(tiny.model, policy)
    return generate(tiny.model, tiny.tokenizer, tokens, cache, sampling, **options)


@pytest.mark.parametrize("chunk", [13, 64, 1000])
def test_greedy_with_the_full_cache_equals_generate(tiny: LoadedModel, chunk: int) -> None:
    ids = torch.tensor([tiny.tokenizer.encode(make_text(200))])
    expected = tiny.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    result = run(tiny, "full", Sampling(max_new_tokens=24), chunk=chunk)
    assert list(result.token_ids) == expected[0, 200:].tolist()
    assert result.tokens_seen == 200 + 23  # the last token is not fed


def test_the_figures_add_up(tiny: LoadedModel) -> None:
    prefilled: list[tuple[int, int]] = []
    pieces: list[str] = []
    result = run(
        tiny,
        "spectral",
        Sampling(max_new_tokens=40),
        chunk=50,
        on_prefill=lambda done, total: prefilled.append((done, total)),
        on_text=pieces.append,
    )
    assert prefilled == [(50, 200), (100, 200), (150, 200), (200, 200)]
    assert "".join(pieces) == result.text
    assert result.text == tiny.tokenizer.decode(result.token_ids)
    assert len(result.token_ids) == 40
    assert result.tokens_per_s == pytest.approx(39 / result.decode_seconds)
    assert 64 <= result.tokens_kept < 64 + SETTINGS.interval
    assert result.graph_bytes > 0


def test_sampling_follows_its_seed(tiny: LoadedModel) -> None:
    def draw(seed: int, top_p: float = 1.0) -> tuple[int, ...]:
        sampling = Sampling(max_new_tokens=20, temperature=1.5, top_p=top_p, seed=seed)
        return run(tiny, "h2o", sampling).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    greedy = run(tiny, "h2o", Sampling(max_new_tokens=20)).token_ids
    assert draw(1, top_p=1e-6) == greedy  # only the most likely token is left


def test_decoding_stops_at_the_end_of_sequence(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = run(tiny, "full", Sampling(max_new_tokens=12)).token_ids
    stop = free[5]
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [stop])
    stopped = run(tiny, "full", Sampling(max_new_tokens=12)).token_ids
    assert stopped == free[: free.index(stop)]
    ignored = run(tiny, "full", Sampling(max_new_tokens=12, stop_at_eos=False)).token_ids
    assert ignored == free


def continued(loaded: LoadedModel, name: str, sampling: Sampling, **options: Any) -> Any:
    """A text of 200 tokens goes on; `told` are the pieces and counts that were given out."""
    policy = create_policy(PolicySpec(name=name), 64, SETTINGS)
    cache = create_cache(loaded.model, policy)
    logits = prefill(loaded.model, loaded.tokenizer.encode(make_text(200)), cache)
    told: list[Any] = []
    result = continue_text(
        loaded.model,
        loaded.tokenizer,
        logits,
        cache,
        sampling,
        on_text=told.append,
        on_progress=lambda *count: told.append(count),
        **options,
    )
    plain = {"decode_seconds": 0.0, "tokens_per_s": None}
    return replace(result, **plain), told, cache.stats()


def test_a_loop_gives_the_same_text(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[bool] = []

    def can_loop(model: Any, cache: EvictingCache) -> bool:  # noqa: ARG001
        cache.check_steps()
        loops.append(True)
        return True

    sampling = Sampling(max_new_tokens=40)
    free = continued(tiny, "spectral", sampling)
    # On a CPU nothing is captured, so nothing changes.
    assert continued(tiny, "spectral", sampling, captured=True) == free
    monkeypatch.setattr(generation, "_can_loop", can_loop)
    result, told, stats = continued(tiny, "spectral", sampling, captured=True)
    assert loops == [True]
    assert (result.token_ids, result.text, told) == (free[0].token_ids, free[0].text, free[1])
    assert (result.tokens_seen, result.tokens_kept) == (239, free[0].tokens_kept)
    assert stats.attention == "policy"

    stop = result.token_ids[21]
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [stop])
    expected = result.token_ids[: result.token_ids.index(stop)]
    stopped, told, _ = continued(tiny, "spectral", sampling, captured=True)
    assert stopped.token_ids == expected
    assert told[-1] == (len(expected), 40)
    assert stopped.tokens_seen == 200 + len(expected)
    ignoring = replace(sampling, stop_at_eos=False)
    assert continued(tiny, "spectral", ignoring, captured=True)[0].token_ids == free[0].token_ids

    def draw(seed: int, top_p: float = 1.0) -> tuple[int, ...]:
        drawing = replace(ignoring, temperature=1.5, top_p=top_p, seed=seed)
        return tuple(continued(tiny, "spectral", drawing, captured=True)[0].token_ids)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, top_p=1e-6) == free[0].token_ids


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", ["spectral", "h2o"])
def test_on_cuda_a_loop_is_captured_where_the_policy_attends(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make_loaded()
    loaded.model.to("cuda")
    sampling = Sampling(max_new_tokens=40)
    expected, told, _ = continued(loaded, name, sampling)
    captured: list[bool] = []
    real = DecodeLoop.run

    def run(self: DecodeLoop, *arguments: Any) -> None:
        real(self, *arguments)
        captured.append(self.is_captured)

    monkeypatch.setattr(DecodeLoop, "run", run)
    got, told_of_loop, _ = continued(loaded, name, sampling, captured=True)
    assert captured == ([True] if name == "spectral" else [])
    assert (got.token_ids, told_of_loop) == (expected.token_ids, told)


def test_one_token_has_no_rate(tiny: LoadedModel) -> None:
    assert run(tiny, "full", Sampling(max_new_tokens=1)).tokens_per_s is None


def test_text_comes_in_whole_characters() -> None:
    text = "naïve 😀 → end"
    tokens = make_tokenizer().encode(text)
    pieces = TextPieces(make_tokenizer())
    given = [pieces.add(token) for token in tokens] + [pieces.flush()]
    assert "".join(given) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in given)
    assert given[2:4] == ["", "ï"]


def test_a_cut_character_is_not_lost() -> None:
    tokens = make_tokenizer().encode("a😀")[:3]
    pieces = token_pieces(make_tokenizer(), tokens)
    assert len(pieces) == 3
    assert pieces[:2] == ("a", "")
    assert pieces[2] == "\N{REPLACEMENT CHARACTER}"
    assert token_pieces(make_tokenizer(), []) == ()


def test_bad_arguments_are_refused(tiny: LoadedModel) -> None:
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
    ):
        with pytest.raises(EvaluationError, match=message):
            Sampling(**options)  # type: ignore[arg-type]
    cache = create_cache(tiny.model, create_policy(PolicySpec(name="full"), None, SETTINGS))
    for tokens, chunk, message in (([], 8, "no tokens"), ([1], 0, "chunk must be")):
        with pytest.raises(EvaluationError, match=message):
            generate(tiny.model, tiny.tokenizer, tokens, cache, Sampling(), chunk=chunk)


def test_decode_makes_no_pass_that_it_does_not_need(tiny: LoadedModel) -> None:
    cache = create_cache(tiny.model, create_policy(PolicySpec(name="full"), None, SETTINGS))
    logits = torch.zeros(len(tiny.tokenizer))
    assert len(list(decode(tiny.model, logits, cache, Sampling(max_new_tokens=1)))) == 1
    assert cache.stats().tokens_seen == 0
