"""Generation in two timed phases: a chunked prefill, then decoding token by token."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from spectralkv.evaluation.datasets import Tokenizer
    from spectralkv.hf import EvictingCache

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when decoding ends.

    Attributes
    ----------
    max_new_tokens : int
        Most tokens to decode.
    temperature : float
        0 takes the most likely token; above 0 tokens are drawn.
    top_p : float
        Draw from the most likely tokens that hold this share of probability, in (0, 1].
    seed : int
        Seed of the draws.
    stop_at_eos : bool
        End at an end-of-sequence token (which is not given out).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise EvaluationError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0.0:
            raise EvaluationError(f"temperature must be at least 0, got {self.temperature:g}")
        if not 0.0 < self.top_p <= 1.0:
            raise EvaluationError(f"top_p must be above 0 and at most 1, got {self.top_p:g}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished generation.

    Attributes
    ----------
    text : str
        The new text.
    token_ids : tuple of int
        The new tokens.
    prefill_seconds : float
        Time of the prefill; 0 where decoding went on from a filled cache.
    decode_seconds : float
        Time of the forward passes and choices after the first new token.
    tokens_per_s : float or None
        New tokens a second while decoding, the first one (it comes out of the prefill) left out;
        None when there was only one.
    kv_bytes, graph_bytes : int
        Bytes in the cache at the end.
    tokens_seen, tokens_kept : int
        Tokens fed, and tokens still in the cache, a layer and KV head.
    """

    text: str
    token_ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    tokens_per_s: float | None
    kv_bytes: int
    graph_bytes: int
    tokens_seen: int
    tokens_kept: int


def prefill(
    model: Any,
    token_ids: Sequence[int],
    cache: EvictingCache,
    *,
    chunk: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Feed a prompt through a cache in chunks.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    token_ids : sequence of int
        The prompt.
    cache : spectralkv.hf.EvictingCache
        Mutated. It evicts between chunks, so the peak is the budget, its interval and a chunk.
    chunk : int
        Tokens a forward pass.
    on_progress : callable, optional
        Called with (tokens fed, tokens of the prompt) after each pass.

    Returns
    -------
    torch.Tensor
        Logits (V,) of the first new token.

    Raises
    ------
    EvaluationError
        The prompt is empty, or `chunk` is below 1.
    """
    import torch

    from spectralkv.hf import cache_argument

    if not token_ids:
        raise EvaluationError("the prompt has no tokens")
    if chunk < 1:
        raise EvaluationError(f"chunk must be at least 1 token, got {chunk}")
    ids = torch.tensor([list(token_ids)], dtype=torch.long, device=model.device)
    total = ids.shape[1]
    last_only = last_logits_only(model)
    logits = None
    with torch.no_grad():
        for begin in range(0, total, chunk):
            part = ids[:, begin : begin + chunk]
            output = model(input_ids=part, **cache_argument(cache), use_cache=True, **last_only)
            logits = output.logits[0, -1]
            if on_progress is not None:
                on_progress(begin + part.shape[1], total)
    if ids.is_cuda:  # whoever times this means the work, not the queueing of it
        torch.cuda.synchronize(ids.device)
    return logits


def decode(model: Any, logits: Any, cache: EvictingCache, sampling: Sampling) -> Iterator[int]:
    """Decode token by token from a filled cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    logits : torch.Tensor
        Logits (V,) that follow the cache's last token.
    cache : spectralkv.hf.EvictingCache
        Mutated.
    sampling : Sampling
        How to choose, and when to stop.

    Yields
    ------
    int
        The next token id.
    """
    import torch

    from spectralkv.hf import cache_argument

    stop = eos_token_ids(model) if sampling.stop_at_eos else frozenset()
    generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    last_only = last_logits_only(model)
    for step in range(sampling.max_new_tokens):
        token = _choose(logits, sampling, generator)
        if token in stop:
            return
        yield token
        if step + 1 == sampling.max_new_tokens:
            return
        with torch.no_grad():
            ids = torch.tensor([[token]], device=logits.device)
            output = model(input_ids=ids, **cache_argument(cache), use_cache=True, **last_only)
            logits = output.logits[0, -1]


class _Taker:
    """A streamer that hands on each token but those that end a text."""

    def __init__(self, take: Callable[[int], None], stop: frozenset[int]) -> None:
        self._take = take
        self._stop = stop

    def put(self, value: Any) -> None:
        for token in value.tolist():
            if token not in self._stop:
                self._take(token)

    def end(self) -> None:
        """Nothing is held back."""


def _can_loop(model: Any, cache: EvictingCache) -> bool:
    if model.device.type != "cuda":
        return False
    try:
        cache.check_steps()
    except ValueError:
        return False
    return True


def _decode_in_loop(
    model: Any,
    logits: Any,
    cache: EvictingCache,
    sampling: Sampling,
    take: Callable[[int], None],
) -> None:
    """Do as `decode` does, by a loop that is captured where that is possible."""
    import torch

    from spectralkv import hf

    stop = eos_token_ids(model) if sampling.stop_at_eos else frozenset()
    drawing = hf.Sampling(
        do_sample=sampling.temperature > 0.0,
        temperature=sampling.temperature or 1.0,
        top_p=sampling.top_p,
        generator=torch.Generator(device=logits.device).manual_seed(sampling.seed),
    )
    hf.decode(
        model,
        cache,
        logits[None],
        positions=torch.tensor([cache.get_seq_length()]),
        max_new_tokens=sampling.max_new_tokens,
        sampling=drawing,
        eos_token_id=sorted(stop),
        streamer=_Taker(take, stop),
    )


def continue_text(
    model: Any,
    tokenizer: Tokenizer,
    logits: Any,
    cache: EvictingCache,
    sampling: Sampling,
    *,
    prefill_seconds: float = 0.0,
    captured: bool = False,
    on_text: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Decode from a filled cache, giving the text out as it comes.

    Parameters
    ----------
    model, logits, cache, sampling
        As for `decode`.
    tokenizer : Tokenizer
        The model's tokenizer.
    prefill_seconds : float
        What the prefill took, for the record.
    captured : bool
        On CUDA, where the policy attends: replay a step as one CUDA graph
        (:class:`spectralkv.hf.DecodeLoop`), which takes a part of the time. Tokens that are drawn
        are others than without, for the same seed.
    on_text : callable, optional
        Called with each new piece of text; whole characters only.
    on_progress : callable, optional
        Called with (tokens decoded, most tokens).

    Returns
    -------
    Generation
        The text, and what it took.
    """
    pieces = TextPieces(tokenizer)
    tokens: list[int] = []
    text: list[str] = []
    first = last = time.perf_counter()

    def take(token: int) -> None:
        nonlocal first, last
        last = time.perf_counter()
        if not tokens:
            first = last
        tokens.append(token)
        text.append(pieces.add(token))
        if on_text is not None and text[-1]:
            on_text(text[-1])
        if on_progress is not None:
            on_progress(len(tokens), sampling.max_new_tokens)

    if captured and _can_loop(model, cache):
        _decode_in_loop(model, logits, cache, sampling, take)
    else:
        for token in decode(model, logits, cache, sampling):
            take(token)
    text.append(pieces.flush())
    if on_text is not None and text[-1]:
        on_text(text[-1])
    stats = cache.stats()
    decoded = len(tokens) - 1
    return Generation(
        text="".join(text),
        token_ids=tuple(tokens),
        prefill_seconds=prefill_seconds,
        decode_seconds=last - first,
        tokens_per_s=decoded / (last - first) if decoded > 0 and last > first else None,
        kv_bytes=int(stats.kv_bytes),
        graph_bytes=int(stats.graph_bytes),
        tokens_seen=int(stats.tokens_seen),
        tokens_kept=int(stats.tokens_kept),
    )


def generate(
    model: Any,
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    cache: EvictingCache,
    sampling: Sampling,
    *,
    chunk: int = 256,
    on_prefill: Callable[[int, int], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Prefill a prompt and decode what follows it.

    Parameters
    ----------
    model, tokenizer, cache, sampling, on_text
        As for `continue_text`.
    token_ids, chunk
        As for `prefill`.
    on_prefill : callable, optional
        Called with (tokens fed, tokens of the prompt).

    Returns
    -------
    Generation
        The text, and what it took.
    """
    start = time.perf_counter()
    logits = prefill(model, token_ids, cache, chunk=chunk, on_progress=on_prefill)
    seconds = time.perf_counter() - start
    return continue_text(
        model, tokenizer, logits, cache, sampling, prefill_seconds=seconds, on_text=on_text
    )


class TextPieces:
    """Turns a stream of tokens into pieces of text that end at whole characters.

    A byte-level token may hold a part of a character; its bytes then come with the token that
    completes them. Only the last few tokens are decoded again at each step.

    Parameters
    ----------
    tokenizer : Tokenizer
        The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # given out; kept because some tokens decode by their left
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Take one token; return the text that it completes, which may be empty."""
        self._pending.append(token)
        text = self._new_text()
        return "" if text.endswith(_REPLACEMENT) else self._give(text)

    def flush(self) -> str:
        """Return what is still held back, incomplete characters included."""
        return self._give(self._new_text()) if self._pending else ""

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _give(self, text: str) -> str:
        self._context, self._pending = self._pending[-4:], []
        return text


def token_pieces(tokenizer: Tokenizer, token_ids: Iterable[int]) -> tuple[str, ...]:
    """Return the text of every token; together they are the text.

    Parameters
    ----------
    tokenizer : Tokenizer
        The model's tokenizer.
    token_ids : iterable of int
        N token ids.

    Returns
    -------
    tuple of str
        N pieces. Of tokens that share a character the last holds it and the others are empty.
    """
    pieces = TextPieces(tokenizer)
    texts = [pieces.add(token) for token in token_ids]
    if texts:
        texts[-1] += pieces.flush()
    return tuple(texts)


def _choose(logits: Any, sampling: Sampling, generator: Any) -> int:
    import torch

    if sampling.temperature == 0.0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    # A token stays if the mass before it is below top_p, so that at least one always does.
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
    drawn = torch.multinomial(ordered, 1, generator=generator)
    return int(order[drawn])


def eos_token_ids(model: Any) -> frozenset[int]:
    """Return the ids of the tokens that end a text of this model; none if it names none."""
    config = getattr(model, "generation_config", None) or model.config
    eos = config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, (list, tuple)) else frozenset((int(eos),))


def last_logits_only(model: Any) -> dict[str, int]:
    """Return the arguments that spare the (chunk, V) logits but the last row, where a model can."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}
