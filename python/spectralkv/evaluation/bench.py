"""How fast a model decodes with each kind of cache, and what memory that takes.

Tokens are random, and so are the weights where only a shape is given: neither changes how long a
step takes. Caches that keep everything get random keys and values in place of a long prompt;
those that evict read a real prompt of as many tokens as they would hold after a long one. What is
timed is decoding alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.models import LoadedModel, resolve_device
from spectralkv.policies.base import Policy

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from spectralkv.evaluation.progress import Progress

#: Models by shape, for random weights: Llama 3.1 8B, SmolLM2 135M, and one for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# Before the clock: two kinds of cuts are met, each is captured the second time, and one more.
_INTERVALS_BEFORE = 4


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes
    ----------
    contexts : tuple of int
        Tokens before the first decode step.
    budgets : tuple of float
        Shares of the context that evicting caches keep.
    batch : int
        Sequences.
    steps : int
        Decode steps of one measurement.
    repeats : int
        Measurements, one after the other.
    interval, window : int
        See `spectralkv.policies.Policy`.
    chunk : int
        Tokens of the prompt that are fed together.

    Raises
    ------
    EvaluationError
        An option is out of range.
    """

    contexts: tuple[int, ...]
    budgets: tuple[float, ...] = (0.1, 0.2, 0.5)
    batch: int = 1
    steps: int = 128
    repeats: int = 5
    interval: int = 32
    window: int = 50
    chunk: int = 1024

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "repeats", "interval", "chunk"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.contexts or min(self.contexts) < 1:
            raise EvaluationError(f"contexts must be numbers of 1 or more, got {self.contexts}")
        for share in self.budgets:
            if not 0.0 < share < 1.0:
                raise EvaluationError(f"budgets must be shares between 0 and 1, got {share}")
            for context in self.contexts:
                self.policy(context, share)

    @property
    def steps_before(self) -> int:
        """Steps before the clock runs."""
        return _INTERVALS_BEFORE * self.interval

    def policy(self, context: int, share: float) -> Policy:
        """Return the policy that keeps a share of a context.

        Raises
        ------
        EvaluationError
            The context is too short for it.
        """
        from spectralkv.policies import Spectral

        try:
            return Spectral(
                budget=round(context * share), interval=self.interval, window=self.window
            )
        except ValueError as error:
            raise EvaluationError(f"{share:.0%} of a context of {context}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One kind of cache at one context.

    Attributes
    ----------
    kind : str
        The cache and how it is driven.
    context : int
        Tokens before the first step.
    budget : int or None
        Tokens that an evicting cache keeps.
    step_seconds : tuple of float
        Seconds a step, one entry a measurement; empty where `failure` says why.
    batch : int
        Sequences.
    kv_bytes, graph_bytes : int
        Bytes of keys and values, and of the policy's state, at the end.
    peak_bytes : int or None
        Most bytes that torch's allocator held while decoding, weights included; None on the CPU.
        The policy's state is not in it.
    is_captured : bool
        Whether steps were replayed as a CUDA graph.
    failure : str
        Why there are no times; "" where there are.
    """

    kind: str
    context: int
    budget: int | None = None
    step_seconds: tuple[float, ...] = ()
    batch: int = 1
    kv_bytes: int = 0
    graph_bytes: int = 0
    peak_bytes: int | None = None
    is_captured: bool = False
    failure: str = ""

    @property
    def seconds(self) -> float:
        """Median of the seconds a step."""
        return median(self.step_seconds)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences a second."""
        return self.batch / self.seconds


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All rows of a model.

    Attributes
    ----------
    model : str
        Its name.
    config : BenchConfig
        What was measured.
    rows : tuple of BenchRow
        By context, then by kind. The first kind is measured again at the end, for `noise`.
    """

    model: str
    config: BenchConfig
    rows: tuple[BenchRow, ...]

    def noise(self, context: int) -> float:
        """Return how much two measurements of one cache differ; NaN where there are not two."""
        same = [
            row for row in self.rows if row.context == context and row.kind == self.rows[0].kind
        ]
        times = [row.seconds for row in same if not row.failure]
        return abs(times[0] - times[1]) / min(times) if len(times) == 2 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return {
            "model": self.model,
            "config": asdict(self.config),
            "noise": {str(context): self.noise(context) for context in self.config.contexts},
            "rows": [
                asdict(row) | ({} if row.failure else {"tokens_per_s": row.tokens_per_s})
                for row in self.rows
            ],
        }


def random_model(shape: str, *, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Return a model of random weights; it has no tokenizer.

    Parameters
    ----------
    shape : str
        One of :data:`SHAPES`.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        Type of the weights; "auto": float32 on the CPU, bfloat16 on CUDA.
    device : str
        Where the model runs.

    Raises
    ------
    EvaluationError
        There is no such shape, dtype or device.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape not in SHAPES:
        raise EvaluationError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise EvaluationError(f"dtype must be auto, float32, float16 or bfloat16, got {dtype!r}")
    device = resolve_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 20)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=getattr(torch, dtype)
        )
    return LoadedModel(name=f"{shape} shape, random weights", model=model.eval(), tokenizer=None)


def run_bench(
    loaded: LoadedModel, config: BenchConfig, *, on_progress: Progress | None = None
) -> BenchResult:
    """Measure every kind of cache at every context.

    A kind that does not fit into memory, or cannot be captured, has a row that says so.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    config : BenchConfig
        What to measure.
    on_progress : callable, optional
        Told of each kind that is done.
    """
    import torch

    kinds = list(_kinds(config))
    kinds.append(kinds[0])  # against itself: the noise
    total = len(config.contexts) * len(kinds)
    rows: list[BenchRow] = []
    for context in config.contexts:
        for name, share, make in kinds:
            if on_progress is not None:
                on_progress("measuring", len(rows), total)
            budget = None if share is None else config.policy(context, share).budget
            row = BenchRow(kind=name, context=context, budget=budget, batch=config.batch)
            try:
                with torch.no_grad():
                    rows.append(_measured(make(loaded.model, config, context, share), config, row))
            except torch.cuda.OutOfMemoryError:
                rows.append(replace(row, failure="out of memory"))
            except RuntimeError as error:
                if "captur" not in str(error):
                    raise
                rows.append(replace(row, failure=f"not captured: {str(error).splitlines()[0]}"))
            gc.collect()  # a captured graph and its cache refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if on_progress is not None:
        on_progress("measuring", total, total)
    return BenchResult(model=loaded.name, config=config, rows=tuple(rows))


def plot_bench(result: BenchResult, path: Path, *, where: str) -> None:
    """Draw tokens a second and memory against the context.

    Parameters
    ----------
    result : BenchResult
        What was measured.
    path : pathlib.Path
        The PNG to write.
    where : str
        Device and dtype, for the title.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    from spectralkv.evaluation import plots

    figure, (speed, memory) = plots.new_figure(11.0, 4.6, columns=2)
    kinds = list(dict.fromkeys(row.kind for row in result.rows))
    shares = list(result.config.budgets)
    for kind in kinds:
        rows = [row for row in result.rows if row.kind == kind and not row.failure]
        rows = list({row.context: row for row in reversed(rows)}.values())[::-1]
        name, _, share = kind.partition(" ")
        # A colour a budget, and dashes for what is not the best of its kind.
        colour = plots.FULL_COLOUR
        if share:
            order = [f"{one:.0%}" for one in shares].index(share)
            colour = plots.COLOURS[order % len(plots.COLOURS)]
        style = {
            "marker": "o",
            "color": colour,
            "label": kind,
            "linewidth": 1.8,
            "linestyle": "--" if name in ("StaticCache", "EvictingCache") else "-",
        }
        at = [row.context for row in rows]
        speed.plot(at, [row.tokens_per_s for row in rows], **style)
        held = [(row.kv_bytes + row.graph_bytes) / 2**20 for row in rows]
        memory.plot(at, held, **style)
    for axis, label in ((speed, "tokens/s"), (memory, "keys, values and graph (MiB)")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(result.config.contexts, [f"{one:,}" for one in result.config.contexts])
        axis.set_xlabel("context (tokens)")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    speed.set_title(
        f"{result.model}, batch {result.config.batch}, {where}", loc="left", fontsize=11
    )
    memory.legend(frameon=False, fontsize=8)
    noise = max((result.noise(context) for context in result.config.contexts), default=0.0)
    plots.add_footnote(
        figure,
        f"Decoding alone, medians of {result.config.repeats} x {result.config.steps} steps; the "
        f"same cache measured twice differs by up to {noise:.1%}. Full caches hold random keys and "
        "values, evicting ones read a prompt of as many tokens as they keep.",
    )
    plots.save_figure(figure, path)


# -- kinds of caches


class _Subject:
    """A filled cache and the steps that it takes."""

    def __init__(
        self, cache: Any, run: Callable[[int], None], is_captured: Callable[[], bool] | None = None
    ) -> None:
        self.cache = cache
        self.run = run
        self.is_captured = is_captured or (lambda: False)


_Make = Callable[[Any, BenchConfig, int, "float | None"], _Subject]


def _kinds(config: BenchConfig) -> Iterator[tuple[str, float | None, _Make]]:
    yield "DynamicCache", None, _dynamic
    yield "StaticCache", None, _static
    for share in config.budgets:
        yield f"EvictingCache {share:.0%}", share, _evicting
    for share in config.budgets:
        yield f"DecodeLoop {share:.0%}", share, _loop


def _dynamic(model: Any, config: BenchConfig, context: int, _: float | None) -> _Subject:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    _fill(model, cache, config.batch, context)
    return _Subject(cache, _eager(model, cache, config.batch))


def _static(model: Any, config: BenchConfig, context: int, _: float | None) -> _Subject:
    import torch
    from transformers import StaticCache

    steps = config.steps_before + config.steps * config.repeats
    cache = StaticCache(config=model.config, max_cache_len=context + steps)
    _fill(model, cache, config.batch, context)
    run = _eager(model, cache, config.batch)
    if model.device.type != "cuda":
        return _Subject(cache, run)
    run(2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(1)

    def replay(count: int) -> None:
        for _ in range(count):
            graph.replay()

    return _Subject(cache, replay, lambda: True)


def _evicting(model: Any, config: BenchConfig, context: int, share: float | None) -> _Subject:
    cache, _ = _prompted(model, config, context, share)
    return _Subject(cache, _eager(model, cache, config.batch))


def _loop(model: Any, config: BenchConfig, context: int, share: float | None) -> _Subject:
    import torch

    from spectralkv.hf import DecodeLoop

    cache, logits = _prompted(model, config, context, share)
    positions = torch.full((config.batch,), context, device=model.device)
    steps = config.steps_before + config.steps * config.repeats
    loop = DecodeLoop(model, cache, logits=logits, positions=positions, max_new_tokens=steps + 1)
    return _Subject(cache, loop.run, lambda: loop.is_captured)


def _prompted(
    model: Any, config: BenchConfig, context: int, share: float | None
) -> tuple[Any, torch.Tensor]:
    """Return a cache that is as full as a long prompt leaves it, and the last logits."""
    import torch

    from spectralkv.hf import EvictingCache

    policy = config.policy(context, share or 0.0)
    cache = EvictingCache(model.config, policy)
    count = policy.budget or context
    generator = torch.Generator().manual_seed(context)
    shape = (config.batch, count)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    for start in range(0, count, config.chunk):
        logits = model(
            input_ids=ids[:, start : start + config.chunk],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return cache, logits[:, -1]


def _fill(model: Any, cache: Any, batch: int, context: int) -> None:
    """Put random keys and values into a cache that keeps all."""
    import torch

    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = (batch, heads, context, dim)
        keys, values = (
            torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        cache.update(keys, values, layer)


def _eager(model: Any, cache: Any, batch: int) -> Callable[[int], None]:
    import torch

    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def run(count: int) -> None:
        for _ in range(count):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids.copy_(logits[:, -1:].argmax(-1))

    return run


# -- the clock


def _measured(subject: _Subject, config: BenchConfig, row: BenchRow) -> BenchRow:
    import torch

    on_cuda = torch.cuda.is_available()
    subject.run(config.steps_before)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(config.repeats):
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        subject.run(config.steps)
        if on_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / config.steps)
    kv_bytes, graph_bytes = _bytes_of(subject.cache)
    return replace(
        row,
        step_seconds=tuple(times),
        kv_bytes=kv_bytes,
        graph_bytes=graph_bytes,
        peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
        is_captured=subject.is_captured(),
    )


def _bytes_of(cache: Any) -> tuple[int, int]:
    if hasattr(cache, "stats"):
        stats = cache.stats()
        return stats.kv_bytes, stats.graph_bytes
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors), 0
