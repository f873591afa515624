"""A lean decode loop: the same step each time, captured once as a CUDA graph and replayed.

A step of `model.generate` launches hundreds of kernels from Python, which for small batches takes
longer than the device computes. Nothing in a step of an evicting cache whose policy attends has to
change from one to the next: slots stay where they are, lengths live on the device, and when
sequences are cut follows from counting. So the step is captured once, and so is each kind of cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from spectralkv.hf.cache import EvictingCache
from spectralkv.hf.naming import cache_argument
from spectralkv.hf.streams import capture_stream
from spectralkv.policies.base import AttendingTracker

# Steps before the capture: they run what allocates or compiles at its first use.
_STEPS_BEFORE_CAPTURE = 2
# Steps between two looks at whether all sequences have ended.
_LOOK_EVERY = 8


class Streamer(Protocol):
    """What gets tokens as they come; transformers' streamers are such."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (B, N), then new tokens (B,), on the CPU."""

    def end(self) -> None:
        """Learn that there are no more."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, on the device.

    Parameters
    ----------
    do_sample : bool
        False: the most likely token, whatever the other options.
    temperature : float
        Logits are divided by it.
    top_k : int
        Only the `top_k` most likely tokens; 0: all.
    top_p : float
        Only the most likely tokens that together reach the probability `top_p`.
    generator : torch.Generator or None
        Random numbers, on the model's device; None: torch's own.

    Raises
    ------
    ValueError
        An option is out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("temperature", self.temperature > 0.0, "above 0"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
        ):
            if not holds:
                raise ValueError(f"[Sampling] {name} must be {expected}, got {getattr(self, name)}")

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next token of each sequence, int64 (B,), from logits (B, V)."""
        logits = logits.float()
        if not self.do_sample:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = logits.sort(-1, descending=True)
            probabilities = ordered.softmax(-1)
            # A token goes if those before it reach top_p already; so the first one stays.
            goes = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(goes.scatter(-1, order, goes), float("-inf"))
        # The smallest of exponential variables with the rates p is i with probability p_i. Unlike
        # torch.multinomial it asks nothing of the host.
        probabilities = logits.softmax(-1)
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / noise).argmax(-1)


class DecodeLoop:
    """Decodes one batch, step by step, after its prompt went into an evicting cache.

    On CUDA the step is captured as a CUDA graph and replayed, and so is each cut that comes again;
    the host neither waits for a step nor looks at a tensor. Elsewhere, and where a capture is not
    possible, the same calls are made each time. Kept tokens and logits are those of
    `model.generate` with the same cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    cache : EvictingCache
        It holds the prompt, and its policy attends: Spectral, and `attention` is not "model".
    logits : torch.Tensor
        (B, V), of the prompt's last token: the first new token is chosen from them.
    positions : torch.Tensor
        int64 (B,): real tokens of each sequence, which is the position of its next one.
    max_new_tokens : int
        N: most tokens that are chosen, the first one included.
    sampling : Sampling
        How tokens are chosen.
    eos_token_ids : sequence of int
        Tokens that end a sequence.
    pad_token_id : int
        What a sequence that has ended goes on with.
    attention_mask : torch.Tensor or None
        (B, S) of the prompt, 0 marks padding. Needed only for padded batches of models of which
        some layers never evict.
    capture : bool or None
        True: capture, or an error that says why not; None: where it is possible.
    compiled : bool or str
        Compile the model's step by torch.compile, whole, with its default backend or the one that
        is named. It takes seconds to minutes at the first step of a model and batch size, and
        fuses what lies between matrix products. The model is captured as compiled.

    Raises
    ------
    ValueError
        An argument is out of range, `cache` cannot be decoded with, `capture` is True and
        impossible, or the model is to be compiled and some of its layers never evict, or by a
        backend that torch.compile does not know.
    """

    def __init__(
        self,
        model: Any,
        cache: EvictingCache,
        *,
        logits: torch.Tensor,
        positions: torch.Tensor,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int = 0,
        attention_mask: torch.Tensor | None = None,
        capture: bool | None = None,
        compiled: bool | str = False,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"[decode] max_new_tokens must be 1 or more, got {max_new_tokens}")
        self._model = model
        self._cache = cache
        self._sampling = sampling or Sampling()
        self._limit = max_new_tokens
        self._captures = self._may_capture(capture)
        self._backend = "inductor" if compiled is True else compiled or None
        self._count = 0  # tokens chosen
        batch, device = logits.shape[0], logits.device
        self._pad = pad_token_id
        self._eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self._ids = torch.empty(batch, 1, dtype=torch.int64, device=device)
        self._positions = positions.to(device, torch.int64, copy=True).view(batch, 1)
        self._tokens = torch.full((batch, max_new_tokens), pad_token_id, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._only_ours = len(cache.evicting_layers) == len(cache.layers)
        if self._backend is not None and not self._only_ours:
            others = len(cache.layers) - len(cache.evicting_layers)
            raise ValueError(
                f"[decode] compiled expected layers that all evict, got {others} of another kind"
            )
        if self._backend is not None:
            from spectralkv.hf import compiled_step  # registers an operator

            compiled_step.check_backend(self._backend)
        # Policies that attend read no mask; transformers makes none where it is given one.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        self._padding = attention_mask
        self._step_graph: torch.cuda.CUDAGraph | None = None
        self._cut_graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph | None] = {}
        self._layouts: tuple[int, ...] = ()  # of the layers, as the captures know them
        self._eager_steps = 0
        # Memory of all captures: their replays follow each other, and none reads what another left.
        self._pool: Any = None
        with torch.no_grad():
            self._take(logits)
        self._count = 1

    @property
    def count(self) -> int:
        """Tokens chosen so far, of each sequence."""
        return self._count

    @property
    def tokens(self) -> torch.Tensor:
        """int64 (B, N): the tokens; columns from `count` on are padding. Written by each step."""
        return self._tokens

    @property
    def finished(self) -> torch.Tensor:
        """Bool (B,): which sequences have ended. Written by each step."""
        return self._finished

    @property
    def only_evicting_layers(self) -> bool:
        """Whether all layers of the cache evict."""
        return self._only_ours

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed."""
        return self._step_graph is not None

    def run(self, steps: int, after_step: Callable[[], bool] | None = None) -> None:
        """Decode `steps` more tokens a sequence.

        Parameters
        ----------
        steps : int
            How many; no more than `max_new_tokens` together.
        after_step : callable, optional
            Called after each step is queued; True ends the run.

        Raises
        ------
        ValueError
            There are too many steps, or the cache has no prompt.
        RuntimeError
            The step cannot be captured.
        """
        if not 0 <= steps <= self._limit - self._count:
            raise ValueError(
                f"[decode] steps must be 0 to {self._limit - self._count} (max_new_tokens less "
                f"what there is), got {steps}"
            )
        with torch.no_grad(), self._cache.steps(steps), self._serving():
            self._forget_old_graphs()
            for _ in range(steps):
                self._step()
                if after_step is not None and after_step():
                    break

    # -- one step

    def _step(self) -> None:
        if self._captures and self._step_graph is None:
            if self._eager_steps == _STEPS_BEFORE_CAPTURE:
                self._step_graph = self._captured(self._forward)
            self._eager_steps += 1
        if self._step_graph is None:
            self._forward()
        else:
            self._step_graph.replay()
        self._count += 1
        layers = self._cache.evicting_layers
        for layer in layers:
            layer.count_step()
        if any(layers[0].due()):
            self._cut()

    def _serving(self) -> AbstractContextManager[None]:
        """Return what must hold while compiled steps run."""
        if self._backend is None:
            return nullcontext()
        from spectralkv.hf import compiled_step

        return compiled_step.serving(self._model, self._cache)

    def _forward(self) -> None:
        if self._backend is not None:
            from spectralkv.hf import compiled_step

            logits = compiled_step.step(
                self._model, self._ids, self._positions, self._no_mask, backend=self._backend
            )
            self._positions += 1
            self._take(logits)
            return
        mask = self._no_mask if self._only_ours else self._mask_of_others()
        logits = self._model(
            input_ids=self._ids,
            position_ids=self._positions,
            attention_mask=mask,
            **cache_argument(self._cache),
            use_cache=True,
        ).logits
        self._positions += 1
        self._take(logits[:, -1])

    def _mask_of_others(self) -> torch.Tensor | None:
        """Return the mask for the layers that never evict, which transformers serves."""
        if self._padding is None:
            return None
        grown = self._padding.new_ones(self._padding.shape[0], 1)
        self._padding = torch.cat((self._padding, grown), 1)
        return self._padding

    def _take(self, logits: torch.Tensor) -> None:
        chosen = self._sampling.choose(logits).masked_fill(self._finished, self._pad)
        self._finished |= (chosen[:, None] == self._eos).any(-1)
        self._ids.copy_(chosen[:, None])
        self._tokens.index_copy_(1, self._column, self._ids)
        self._column += 1

    # -- cuts

    def _cut(self) -> None:
        """Cut the sequences that are due, in all layers."""
        cache, layers = self._cache, self._cache.evicting_layers
        kind = layers[0].lengths  # says who is due and how much the others hold
        if layers[0].divides:  # and how far heads have filled their rooms
            kind = tuple(number for layer in layers for number in layer.cut_kind)
        anew = [layer for layer in layers if layer.divides_anew]
        graph = None if anew else self._cut_graphs.get(kind)
        if graph is None:
            cache.settle()
            if (
                self._captures
                and not anew
                and kind in self._cut_graphs
                and not cache.announces_cuts
            ):
                graph = self._cut_graphs[kind] = self._captured(self._choose_and_release)
            else:  # the first of its kind takes the memory that cuts need
                self._cut_graphs[kind] = None
                for layer in anew:
                    layer.put_side_by_side()
                for layer, keep in zip(layers, cache.choose(), strict=True):
                    layer.cut_by(keep)
                self._forget_old_graphs()  # the cut may have laid the slabs anew
                return
        graph.replay()
        for layer in layers:
            layer.count_cut()

    def _choose_and_release(self) -> None:
        layers = self._cache.evicting_layers
        for layer, keep in zip(layers, self._cache.choose(), strict=True):
            if isinstance(layer.tracker, AttendingTracker):
                layer.tracker.release(keep)

    # -- capture

    def _may_capture(self, capture: bool | None) -> bool:
        if capture is False:
            return False
        cache = self._cache
        devices = {layer.device for layer in cache.evicting_layers if layer.is_initialized}
        others = len(cache.layers) - len(cache.evicting_layers)
        obstacles = [
            layer.tracker.capture_obstacle()
            for layer in cache.evicting_layers
            if isinstance(layer.tracker, AttendingTracker)
        ]
        obstacle = next((one for one in obstacles if one is not None), None)
        if others:
            obstacle = f"layers that all evict, got {others} of another kind"
        elif len(devices) != 1 or next(iter(devices)).type != "cuda":
            obstacle = f"a model on one CUDA device, got {sorted(map(str, devices))}"
        if obstacle is not None and capture:
            raise ValueError(f"[decode] capture=True expected {obstacle}")
        return obstacle is None

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Return a CUDA graph of `work`, which has not run."""
        self._cache.settle()  # the manager must be idle
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        device = self._ids.device  # which need not be the current one
        generator = self._sampling.generator
        if generator is not None:
            graph.register_generator_state(generator)
        try:
            # A capture that fails would leave its stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=self._pool, stream=capture_stream(device)),
            ):
                work()
        except RuntimeError as error:
            # The end of a capture may fail as well, and hide that there was no memory.
            if isinstance(error, torch.OutOfMemoryError) or isinstance(
                error.__context__, torch.OutOfMemoryError
            ):
                raise
            raise RuntimeError(
                "[decode] the step cannot be captured, because the model's code needs the host in "
                f"between; decode with capture=False. It stopped at: {error}"
            ) from error
        return graph

    def _forget_old_graphs(self) -> None:
        """Forget captures of slabs that are not there any more."""
        layouts = tuple(layer.layout for layer in self._cache.evicting_layers)
        if layouts != self._layouts:
            self._layouts = layouts
            self._step_graph = None
            self._eager_steps = 0
            self._cut_graphs.clear()
            self._pool = None  # a pool that no capture uses cannot be used again


class _Watch:
    """Learns what steps have chosen without waiting for the newest of them.

    A copy to the host is queued every few steps and looked at when the next one is queued: the
    device always has work, and is never more than two looks behind.
    """

    def __init__(
        self, loop: DecodeLoop, streamer: Streamer | None, *, every: int, behind: int
    ) -> None:
        self._loop = loop
        self._streamer = streamer
        self._every = every  # steps between two looks
        self._behind = behind  # looks that may be outstanding
        self._copied = 0  # columns
        self._queue: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]] = []
        self.has_ended = False

    def after_step(self) -> bool:
        """Queue a look if it is time; return whether all sequences had ended at an older one."""
        if self._loop.count - self._copied >= self._every:
            self._queue_look()
        self._look(self._behind)
        return self.has_ended

    def finish(self) -> None:
        """Look at what has not been seen yet."""
        if self._loop.count > self._copied:
            self._queue_look()
        self._look(0)

    def _look(self, behind: int) -> None:
        while len(self._queue) > behind:
            tokens, finished, event = self._queue.pop(0)
            if event is not None:
                event.synchronize()
            if self._streamer is not None and not self.has_ended:  # then a look is one column
                self._streamer.put(tokens[:, 0])
            self.has_ended = self.has_ended or bool(finished.all())

    def _queue_look(self) -> None:
        loop = self._loop
        tokens, finished = loop.tokens[:, self._copied : loop.count], loop.finished
        self._copied = loop.count
        if not tokens.is_cuda:
            self._queue.append((tokens.clone(), finished.clone(), None))
            return
        copies = [
            torch.empty_like(one, device="cpu", pin_memory=True) for one in (tokens, finished)
        ]
        for copy, one in zip(copies, (tokens, finished), strict=True):
            copy.copy_(one, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(tokens.device))
        self._queue.append((copies[0], copies[1], event))


def generate(
    model: Any,
    input_ids: torch.Tensor,
    cache: EvictingCache,
    *,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 20,
    sampling: Sampling | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: Streamer | None = None,
    prefill_chunk_size: int | None = None,
    capture: bool | None = None,
    compiled: bool | str = False,
) -> torch.Tensor:
    """Generate as `model.generate` does with the same cache, by a :class:`DecodeLoop`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    input_ids : torch.Tensor
        int64 (B, N). What `cache` has seen of them is not fed again.
    cache : EvictingCache
        New, or of former turns; its policy attends.
    attention_mask : torch.Tensor or None
        (B, N): 0 marks padding, on the left. None: there is none.
    max_new_tokens : int
        Most tokens that are generated.
    sampling : Sampling or None
        How tokens are chosen; None: the most likely ones.
    eos_token_id, pad_token_id : int, sequence of int or None
        What ends a sequence, and what follows then. None: as the model's generation config says.
    streamer : Streamer or None
        Gets the prompt and each token, a step or two after it was chosen.
    prefill_chunk_size : int or None
        Tokens of the prompt that are fed together; None: all.
    capture, compiled
        See :class:`DecodeLoop`.

    Returns
    -------
    torch.Tensor
        int64 (B, N + M), the prompt and the new tokens; M is `max_new_tokens`, or less where all
        sequences ended before.

    Raises
    ------
    ValueError
        An argument is out of range, or the cache or the model cannot be decoded with.
    """
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        raise ValueError("[generate] padding must be on the left, got a mask that ends with 0")
    if prefill_chunk_size is not None and prefill_chunk_size < 1:
        raise ValueError(
            f"[generate] prefill_chunk_size must be 1 or more, got {prefill_chunk_size}"
        )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with torch.no_grad():
        logits = _prefill(model, input_ids, cache, attention_mask, prefill_chunk_size)
    total = input_ids.shape[1]
    new = decode(
        model,
        cache,
        logits,
        positions=torch.full((len(input_ids),), total)
        if attention_mask is None
        else attention_mask.sum(-1),
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        streamer=streamer,
        capture=capture,
        compiled=compiled,
    )
    return torch.cat((input_ids, new), 1)


def decode(
    model: Any,
    cache: EvictingCache,
    logits: torch.Tensor,
    *,
    positions: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 20,
    sampling: Sampling | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: Streamer | None = None,
    capture: bool | None = None,
    compiled: bool | str = False,
) -> torch.Tensor:
    """Decode from a cache that holds the prompt: what :func:`generate` does behind it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    cache : EvictingCache
        It holds the prompt, and its policy attends.
    logits, positions, attention_mask, capture, compiled
        See :class:`DecodeLoop`.
    max_new_tokens, sampling, eos_token_id, pad_token_id
        See :func:`generate`.
    streamer : Streamer or None
        Gets each token, a step or two after it was chosen.

    Returns
    -------
    torch.Tensor
        int64 (B, M): the new tokens. All but the last one of a sequence are in the cache.

    Raises
    ------
    ValueError
        As of :class:`DecodeLoop`.
    """
    config = model.generation_config
    ends = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    loop = DecodeLoop(
        model,
        cache,
        logits=logits,
        positions=positions,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=eos,
        pad_token_id=pad,
        attention_mask=attention_mask,
        capture=capture,
        compiled=compiled,
    )
    # What was fed after all sequences had ended is taken back. Where a cut may have made that
    # impossible, or other layers cannot, each step is waited for.
    can_take_back = cache.policy.protected_window >= 2 * _LOOK_EVERY and loop.only_evicting_layers
    behind = 1 if can_take_back else 0
    every = _LOOK_EVERY if can_take_back and streamer is None else 1
    watch = _Watch(loop, streamer, every=every, behind=behind)
    if not eos and streamer is None:
        loop.run(max_new_tokens - 1)
    elif not watch.after_step():
        loop.run(max_new_tokens - 1, watch.after_step)
    if streamer is not None:
        watch.finish()
        streamer.end()
    new = loop.tokens[:, : loop.count]
    kept = _columns_used(new, eos)
    if kept < loop.count:
        cache.crop(kept - loop.count)
    return new[:, :kept]


def _prefill(
    model: Any,
    input_ids: torch.Tensor,
    cache: EvictingCache,
    attention_mask: torch.Tensor | None,
    chunk_size: int | None,
) -> torch.Tensor:
    """Feed what the cache has not seen; return the logits (B, V) of the last token."""
    total, seen = input_ids.shape[1], cache.get_seq_length()
    if seen >= total:
        raise ValueError(
            f"[generate] input_ids must have tokens that the cache has not seen, got {total} of "
            f"which it saw {seen}"
        )
    options: dict[str, Any] = {**cache_argument(cache), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    positions = torch.arange(total, device=input_ids.device).expand_as(input_ids)
    if attention_mask is not None:
        positions = (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)
    size = chunk_size or total
    for start in range(seen, total, size):
        end = min(start + size, total)
        logits = model(
            input_ids=input_ids[:, start:end],
            position_ids=positions[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            **options,
        ).logits
    last: torch.Tensor = logits[:, -1]
    return last


def _columns_used(tokens: torch.Tensor, eos: Sequence[int]) -> int:
    """Return how many columns there are until all sequences have ended."""
    if not eos:
        return tokens.shape[1]
    ends = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    first = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, tokens.shape[1])
    return int(first.max())
