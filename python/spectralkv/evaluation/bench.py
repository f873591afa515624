"""How fast a model decodes with each kind of cache, and what memory that takes.

Tokens, keys and values are random, and so are the weights where only a shape is given: none of them
changes how long a step takes. What is timed is decoding, and apart from it the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from statistics import linear_regression, median, quantiles
from typing import TYPE_CHECKING, Any

import numpy as np

from spectralkv.evaluation import bench_clock
from spectralkv.evaluation.bench_caches import (
    FULL_GROUPS,
    GROUPS,
    CacheKind,
    Setting,
    Subject,
    cache_bytes,
    cache_kinds,
)
from spectralkv.evaluation.bench_prompt import PromptRow, measure_prompts, prompt_cost
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.models import LoadedModel, resolve_device

if TYPE_CHECKING:
    from spectralkv.evaluation.progress import Progress
    from spectralkv.policies import Spectral
    from spectralkv.policies.head_shares import HeadShares

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
# Steps that are profiled, and timed at least, where each does the same.
_PROFILED = 4
#: Steps of one measurement of a long generation.
FLAT_WINDOW = 500
# The part of the free memory that the largest batch is tried with first, by what follows from the
# memory of a measured batch; then less and less of it.
_LARGEST_SHARES = (0.96, 0.9, 0.8, 0.6)
# Steps for which it is timed, or one interval.
_LARGEST_STEPS = 32
# float32 words of memory a step takes for each logit.
_COPIES_OF_LOGITS = 3
# Tokens of each sequence that a cache is filled with at a time, whatever the batch.
_LEAST_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes
    ----------
    contexts : tuple of int
        Tokens before the first decode step.
    budgets : tuple of float
        Shares of the context that evicting caches keep in the captured loop.
    eager_budgets : tuple of float or None
        The same for those that a plain loop drives, where the host is slower than any cache. None:
        the middle one of `budgets`.
    batch : int
        Sequences.
    steps : int
        Decode steps of one measurement, at least: where tokens are cut it has whole intervals, one
        of a plain loop. Where nothing is cut there are fewer if they would take longer than
        `row_seconds`.
    repeats : int
        Measurements, one after the other.
    row_seconds : float
        No further measurement of a cache begins after so many seconds; there is always one.
    interval, window : int or None, int
        See `spectralkv.policies.Policy`.
    chunk : int
        Tokens, of all sequences together, that an evicting cache is filled with at a time.
    caches : tuple of str
        Groups of caches, see :data:`spectralkv.evaluation.bench_caches.GROUPS`.
    prefill : bool
        Time prompts, too, see :func:`spectralkv.evaluation.bench_prompt.measure_prompts`.
    prompt_rows : tuple of int
        How many of the newest tokens of a prompt get a row of the graph; the policy's default is
        timed in any case.
    compiled : str
        Backend of torch.compile by which the steps of static caches and of the captured loop are
        compiled; "": they are not.
    split : bool
        Profile some steps of each cache, and a prompt; on CUDA.
    largest_batch : bool
        Find the largest batch that fits, of captured caches; on CUDA.
    flat : int
        Tokens of one long generation, see :class:`FlatRun`; 0: none.
    head_shares : HeadShares or None
        Parts of the budget that heads get, (L, Hkv); None: all the same. See
        :func:`spread_head_shares`.

    Raises
    ------
    EvaluationError
        An option is out of range.
    """

    contexts: tuple[int, ...]
    budgets: tuple[float, ...] = (0.1, 0.2, 0.5)
    eager_budgets: tuple[float, ...] | None = None
    batch: int = 1
    steps: int = 128
    repeats: int = 5
    row_seconds: float = 1.5
    interval: int | None = None
    window: int = 50
    chunk: int = 16384
    caches: tuple[str, ...] = GROUPS
    prefill: bool = False
    prompt_rows: tuple[int, ...] = (256, 4096, 1 << 20)
    compiled: str = ""
    split: bool = False
    largest_batch: bool = False
    flat: int = 0
    head_shares: HeadShares | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "repeats", "interval", "chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.row_seconds < 0.0:
            raise EvaluationError(f"row_seconds must be 0 or more, got {self.row_seconds}")
        if not self.contexts or min(self.contexts) < 1:
            raise EvaluationError(f"contexts must be numbers of 1 or more, got {self.contexts}")
        for group in self.caches:
            if group not in GROUPS:
                raise EvaluationError(f"caches must be of {', '.join(GROUPS)}, got {group!r}")
        if not (self.flat == 0 or self.flat >= 2):
            raise EvaluationError(f"flat must be 0 or at least 2 tokens, got {self.flat}")
        if min(self.prompt_rows, default=1) < 1:
            raise EvaluationError(f"prompt_rows must be 1 or more, got {self.prompt_rows}")
        if not self.budgets:
            raise EvaluationError("budgets must be at least one share, got none")
        for share in (*self.budgets, *self.shares_of_plain_loops):
            if not 0.0 < share < 1.0:
                raise EvaluationError(f"budgets must be shares between 0 and 1, got {share}")
            for context in self.contexts:
                self.policy(context, share)
        for context in self.contexts if self.prefill else ():
            policy = self.policy(context, self.middle_budget)
            least = (policy.budget or 0) + policy.cut_interval
            if context < least:
                raise EvaluationError(
                    f"a prompt that is cut must have at least budget + interval = {least} tokens, "
                    f"got a context of {context}"
                )

    @property
    def middle_budget(self) -> float:
        """The middle one of `budgets`."""
        return sorted(self.budgets)[len(self.budgets) // 2]

    @property
    def shares_of_plain_loops(self) -> tuple[float, ...]:
        """What `eager_budgets` says, or stands for."""
        return (self.middle_budget,) if self.eager_budgets is None else self.eager_budgets

    def policy(self, context: int, share: float) -> Spectral:
        """Return the policy that keeps a share of a context.

        Raises
        ------
        EvaluationError
            The context is too short for it.
        """
        from spectralkv.policies import Spectral

        budget = round(context * share)
        try:
            return Spectral(
                budget=budget,
                interval=self.interval,
                window=self.window,
                head_shares=self.head_shares,
            )
        except ValueError as error:
            raise EvaluationError(f"{share:.0%} of a context of {context}: {error}") from None


def spread_head_shares(shares: HeadShares, layers: int, heads: int) -> HeadShares:
    """Return shares that are spread as these are, in random order, for a model of another shape.

    Of a model with random weights no head needs more than another; how long its steps take depends
    on how much heads differ.
    """
    generator = np.random.default_rng(0)
    quantiles = (np.arange(layers * heads) + 0.5) / (layers * heads)
    values = np.quantile([share for layer in shares for share in layer], quantiles)
    spread = generator.permutation(values / values.mean()).reshape(layers, heads)
    return tuple(tuple(float(share) for share in layer) for layer in spread)


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One kind of cache at one context.

    Attributes
    ----------
    kind : str
        The cache and how it is driven.
    group : str
        Which of :data:`spectralkv.evaluation.bench_caches.GROUPS` it is of.
    context : int
        Tokens before the first step.
    share : float or None
        Part of the context that it keeps; None: all.
    budget : int or None
        The same in tokens.
    step_seconds : tuple of float
        Seconds a step, one entry a measurement; empty where `failure` says why.
    batch : int
        Sequences.
    kv_bytes, graph_bytes : int
        Bytes of keys and values, and of the policy's state, at the end.
    peak_bytes : int or None
        Most bytes in use while decoding: weights, caches, and what steps need; None on the CPU.
    is_captured : bool
        Whether steps were replayed as a CUDA graph.
    split : dict
        Seconds a step by part, see :data:`spectralkv.evaluation.bench_clock.PARTS`; empty: it was
        not asked for.
    failure : str
        Why there are no times; "" where there are.
    """

    kind: str
    group: str = ""
    context: int
    share: float | None = None
    budget: int | None = None
    step_seconds: tuple[float, ...] = ()
    batch: int = 1
    kv_bytes: int = 0
    graph_bytes: int = 0
    peak_bytes: int | None = None
    is_captured: bool = False
    split: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def label(self) -> str:
        """Kind and share."""
        return self.kind if self.share is None else f"{self.kind} {100 * self.share:g}%"

    @property
    def seconds(self) -> float:
        """Median of the seconds a step."""
        return median(self.step_seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds a step."""
        if len(self.step_seconds) == 1:
            return self.seconds, self.seconds
        low, _, high = quantiles(self.step_seconds, n=4, method="inclusive")
        return low, high

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences a second."""
        return self.batch / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        if self.failure:
            return asdict(self)
        return asdict(self) | {"seconds": self.seconds, "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True, kw_only=True)
class FlatRun:
    """A long generation in the captured loop: time and memory along it.

    Attributes
    ----------
    context, budget, batch : int
        Tokens before it, tokens that each KV head keeps, sequences.
    window : int
        Steps of one measurement.
    step_seconds : tuple of float
        Seconds a step, one entry a measurement, in order.
    begin_bytes, end_bytes : int
        Memory in use after the first measurement and after the last: all of the device on CUDA,
        the cache's on the CPU.
    """

    context: int
    budget: int
    batch: int
    window: int
    step_seconds: tuple[float, ...]
    begin_bytes: int
    end_bytes: int

    @property
    def growth(self) -> float:
        """How much longer a step takes at the end than at the beginning, as a part of its time.

        By the line of least squares through all measurements.
        """
        line = linear_regression(range(len(self.step_seconds)), self.step_seconds)
        return line.slope * len(self.step_seconds) / median(self.step_seconds)


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
        By context, then as :data:`spectralkv.evaluation.bench_caches.GROUPS` has them.
    prompts : tuple of PromptRow
        By context.
    largest : tuple of BenchRow
        With the largest batch that fits, one measurement each.
    flat : FlatRun or None
        The long generation.
    notes : tuple of str
        What was left out, and what to install for it.
    """

    model: str
    config: BenchConfig
    rows: tuple[BenchRow, ...] = ()
    prompts: tuple[PromptRow, ...] = ()
    largest: tuple[BenchRow, ...] = ()
    flat: FlatRun | None = None
    notes: tuple[str, ...] = ()

    def over_full(self, row: BenchRow) -> float | None:
        """Return a row's time a step over that of the fastest cache that keeps everything."""
        full = [
            one.seconds
            for one in self.rows
            if one.group in FULL_GROUPS
            and (one.context, one.batch) == (row.context, row.batch)
            and not one.failure
        ]
        return None if row.failure or not full else row.seconds / min(full)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        flat = None if self.flat is None else asdict(self.flat) | {"growth": self.flat.growth}
        return {
            "model": self.model,
            "config": asdict(self.config),
            "rows": [row.to_dict() | {"over_full": self.over_full(row)} for row in self.rows],
            "prompts": [
                row.to_dict() | asdict(prompt_cost(row, self.prompts)) for row in self.prompts
            ],
            "largest": [row.to_dict() for row in self.largest],
            "flat": flat,
            "notes": list(self.notes),
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
        There is no such shape, dtype or device, or the weights do not fit.
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
    try:
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=getattr(torch, dtype)
            )
    except torch.cuda.OutOfMemoryError as error:
        raise EvaluationError(
            f"the weights of shape {shape} do not fit: {str(error).splitlines()[0]}"
        ) from None
    return LoadedModel(name=f"{shape} shape, random weights", model=model.eval(), tokenizer=None)


def run_bench(
    loaded: LoadedModel,
    config: BenchConfig,
    *,
    on_progress: Progress | None = None,
    on_result: Callable[[BenchResult], None] | None = None,
) -> BenchResult:
    """Measure every kind of cache at every context.

    A cache that does not fit into memory, or cannot be captured, has a row that says so.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    config : BenchConfig
        What to measure.
    on_progress : callable, optional
        Told of each kind that is done.
    on_result : callable, optional
        Gets what there is after each row.

    Raises
    ------
    EvaluationError
        Something is asked for that needs CUDA, Spectral cannot compute on the model's device, or
        torch.compile knows no such backend.
    """
    from spectralkv.hf.streams import one_stream

    _check_device(loaded, config)
    _check_backend(config.compiled)
    with one_stream(loaded.model.device), bench_clock.quick_collection():
        return _run(loaded, config, on_progress, on_result)


def _run(
    loaded: LoadedModel,
    config: BenchConfig,
    on_progress: Progress | None,
    on_result: Callable[[BenchResult], None] | None,
) -> BenchResult:
    kinds, notes = cache_kinds(config.caches, config.budgets, config.shares_of_plain_loops)
    jobs = list(enumerate((context, kind) for context in config.contexts for kind in kinds))
    # Importing kvpress puts wrappers around attention, so its presses are last at all contexts.
    jobs.sort(key=lambda job: job[1][1].group == "kvpress")
    rows: dict[int, BenchRow] = {}
    result = BenchResult(model=loaded.name, config=config, notes=tuple(notes))
    prompts = config.contexts if config.prefill else ()
    total = len(prompts) + len(jobs) + (config.flat > 0)

    _wake(loaded.model, config.batch)

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress("measuring", done, total)

    def keep(changed: BenchResult) -> BenchResult:
        if on_result is not None:
            on_result(changed)
        return changed

    for done, context in enumerate(prompts):
        tell(done)
        measured = measure_prompts(loaded.model, config, context)
        result = keep(replace(result, prompts=(*result.prompts, *measured)))
    for done, (place, (context, kind)) in enumerate(jobs, len(prompts)):
        tell(done)
        row = rows[place] = _row(loaded.model, config, context, kind)
        result = keep(replace(result, rows=tuple(rows[i] for i in sorted(rows))))
        if config.largest_batch and kind.group in ("fused", "loop"):
            largest = _largest(loaded.model, config, context, kind, row)
            result = keep(replace(result, largest=(*result.largest, largest)))
    if config.flat > 0:
        tell(total - 1)
        try:
            result = keep(replace(result, flat=_flat(loaded.model, config)))
        except Exception as error:
            if not bench_clock.is_out_of_memory(error):
                raise
            note = "left out: the long generation, which does not fit"
            result = keep(replace(result, notes=(*result.notes, note)))
    tell(total)
    return result


def _check_device(loaded: LoadedModel, config: BenchConfig) -> None:
    import spectralkv

    device = loaded.model.device
    for name in ("split", "largest_batch"):
        if getattr(config, name) and device.type != "cuda":
            raise EvaluationError(f"{name} must have a model on CUDA, got one on {device}")
    is_ours = config.prefill or config.flat > 0 or {"loop", "policy", "model"} & set(config.caches)
    if device.type == "cuda" and is_ours and spectralkv.cuda_device_count() == 0:
        raise EvaluationError(
            f"the model is on CUDA, where Spectral cannot follow: {spectralkv.cuda_status()}"
        )


def _check_backend(name: str) -> None:
    if not name:
        return
    from spectralkv.hf import compiled_step

    try:
        compiled_step.check_backend(name)
    except ValueError as error:
        raise EvaluationError(str(error)) from None


def _wake(model: Any, batch: int) -> None:
    """Take a step without a cache: what a device loads at its first use is no cache's memory."""
    import torch

    with torch.no_grad():
        model(input_ids=torch.zeros(batch, 1, dtype=torch.long, device=model.device))


def _empty_row(config: BenchConfig, context: int, kind: CacheKind) -> BenchRow:
    budget = None if kind.share is None else config.policy(context, kind.share).budget
    return BenchRow(
        kind=kind.name,
        group=kind.group,
        context=context,
        share=kind.share,
        budget=budget,
        batch=config.batch,
    )


def _row(model: Any, config: BenchConfig, context: int, kind: CacheKind) -> BenchRow:
    """Measure one cache; where that is not possible, say why."""
    row = _empty_row(config, context, kind)
    bench_clock.free_memory(model.device)
    try:
        return _measured(model, config, kind, row)
    except Exception as error:
        if bench_clock.is_out_of_memory(error):
            return replace(row, failure="does not fit")
        if isinstance(error, RuntimeError) and "captur" in str(error):
            return replace(row, failure=f"not captured: {str(error).splitlines()[0]}")
        if not kind.is_rival:
            raise
        first = next(iter(str(error).splitlines()), "")
        return replace(row, failure=f"failed: {type(error).__name__}: {first}")


def _measured(model: Any, config: BenchConfig, kind: CacheKind, row: BenchRow) -> BenchRow:
    import torch

    device = model.device
    setting = _setting(model, config, row.context, kind.share, config.repeats)
    with torch.no_grad():
        before = bench_clock.DeviceMemory.now(device) if device.type == "cuda" else None
        with kind.open(setting) as subject:
            peak = bench_clock.PeakMemory(device, before)
            times = _times(subject, config, device)
            kv_bytes, graph_bytes = cache_bytes(subject.cache)
            row = replace(
                row,
                step_seconds=times,
                kv_bytes=kv_bytes,
                graph_bytes=graph_bytes,
                peak_bytes=peak.read(),
                is_captured=subject.is_captured(),
            )
            if not config.split:
                return row
            # As many steps have a cut as of all.
            steps = subject.period if subject.period > 1 else _PROFILED
            split = bench_clock.split_of(subject.run, steps, row.seconds, device)
            return replace(row, split=split)


def _times(subject: Subject, config: BenchConfig, device: Any) -> tuple[float, ...]:
    """Warm up, and return seconds a step of each measurement."""
    subject.run(subject.warm_up - 1)
    one = bench_clock.seconds_a_step(subject.run, 1, device)
    begin = time.monotonic()
    if subject.period == 1:  # a slow cache need not take all steps
        steps = min(config.steps, max(_PROFILED, int(config.row_seconds / one)))
    else:
        steps = _whole(config.steps if subject.is_captured() else 1, subject.period)
    times: list[float] = []
    while len(times) < config.repeats:
        times.append(bench_clock.seconds_a_step(subject.run, steps, device))
        if time.monotonic() - begin > config.row_seconds:
            break
    return tuple(times)


def _whole(steps: int, period: int) -> int:
    """Return the fewest steps, but no fewer than these, that are whole periods."""
    return -(-steps // period) * period


def _setting(
    model: Any, config: BenchConfig, context: int, share: float | None, measurements: int
) -> Setting:
    policy = None if share is None else config.policy(context, share)
    period = 1 if policy is None else policy.cut_interval
    profiled = max(period, _PROFILED) if config.split else 0
    return Setting(
        model=model,
        batch=config.batch,
        context=context,
        policy=policy,
        steps=measurements * _whole(config.steps, period) + profiled,
        chunk=max(_LEAST_CHUNK, config.chunk // config.batch),
        compiled=config.compiled,
    )


# -- the largest batch


def _largest(
    model: Any, config: BenchConfig, context: int, kind: CacheKind, row: BenchRow
) -> BenchRow:
    """Return the row of the largest batch that fits: computed from what one takes, then tried."""
    import torch

    if row.failure or row.peak_bytes is None:
        return replace(row, failure=row.failure or "its memory is not known")
    bench_clock.free_memory(model.device)
    free, _ = torch.cuda.mem_get_info(model.device)
    cache = row.kv_bytes + row.graph_bytes
    # What a step needs besides grows with the batch by its logits, in several copies.
    logits = _COPIES_OF_LOGITS * 4 * model.config.get_text_config(decoder=True).vocab_size
    fixed = row.peak_bytes - torch.cuda.memory_allocated(model.device) - cache
    once = replace(config, repeats=1, steps=min(config.steps, _LARGEST_STEPS), split=False)
    tried = row
    for share in _LARGEST_SHARES:
        batch = int((share * free - fixed) / (cache / row.batch + logits))
        tried = _row(model, replace(once, batch=max(1, batch)), context, kind)
        if tried.failure != "does not fit":
            break
    return tried


# -- a long generation


def _flat(model: Any, config: BenchConfig) -> FlatRun:
    import torch

    device, context = model.device, config.contexts[0]
    window = min(FLAT_WINDOW, config.flat // 2)
    count = config.flat // window
    setting = _setting(model, config, context, config.middle_budget, 0)
    setting = replace(setting, steps=count * window)
    (kind,), _ = cache_kinds(("loop",), (config.middle_budget,), ())
    times: list[float] = []
    memory: list[int] = []
    bench_clock.free_memory(device)
    with torch.no_grad(), kind.open(setting) as subject:
        subject.run(subject.warm_up)
        for _ in range(count):
            times.append(bench_clock.seconds_a_step(subject.run, window, device))
            memory.append(_memory_in_use(subject.cache, device))
    return FlatRun(
        context=context,
        budget=setting.budget,
        batch=config.batch,
        window=window,
        step_seconds=tuple(times),
        begin_bytes=memory[0],
        end_bytes=memory[-1],
    )


def _memory_in_use(cache: Any, device: Any) -> int:
    if device.type != "cuda":
        return sum(cache_bytes(cache))
    memory = bench_clock.DeviceMemory.now(device)
    return memory.allocated + memory.foreign
