"""Streaming perplexity: a text goes through a cache that really evicts.

The tokens are fed `chunk` at a time, as a decoder would meet them. Every chunk attends to itself
and to what earlier evictions left, so the loss of a forgotten token shows in all that follows.

Which tokens are scored is fixed once for all runs of a comparison: those at positions
``max(budgets)`` and later, the first that do not fit into the largest budget. So each scored token
comes after every run's budget has filled, and every policy, budget and the full cache are scored on
the same tokens. (Scoring from the smallest budget on would mix, for the larger budgets, tokens in
that were predicted from an uncut cache, and make their loss look smaller than it is.)
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.caches import CacheSettings, create_cache, create_policy
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.specs import FULL, PolicySpec
from spectralkv.evaluation.statistics import PairedDifference, paired_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from spectralkv.evaluation.progress import Progress
    from spectralkv.hf import EvictingCache, EvictionEvent
    from spectralkv.policies import Policy

#: Below this many scored tokens a run is refused: its perplexity would say nothing.
MIN_SCORED_TOKENS = 16

# Logits that are turned to nats at a time: 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What feeding one token sequence through a cache gave.

    Attributes
    ----------
    nll : tuple of float
        Negative log-likelihood in nats of tokens 1 .. N-1, each given the tokens before it.
    next_logits : torch.Tensor
        Logits (V,) of the token after the last one.
    seconds : float
        Wall-clock time of the model's and the cache's work.
    """

    nll: tuple[float, ...]
    next_logits: Any
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SequenceRun:
    """One policy at one budget on one sequence.

    Attributes
    ----------
    nll : tuple of float
        Nats of tokens 1 .. N-1.
    kv_bytes, graph_bytes : int
        Bytes of keys and values, and of the policy's graph, when the last token had been fed.
    tokens_seen, tokens_kept : int
        Tokens fed, and tokens still in the cache, a layer and KV head.
    evictions : int
        Evictions, as the cache counts them.
    seconds : float
        Wall-clock time.
    """

    nll: tuple[float, ...]
    kv_bytes: int
    graph_bytes: int
    tokens_seen: int
    tokens_kept: int
    evictions: int
    seconds: float

    def scored(self, first: int) -> tuple[float, ...]:
        """Return the nats of the tokens at positions `first` and later."""
        return self.nll[first - 1 :]


@dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """One policy at one budget on all sequences.

    Attributes
    ----------
    policy : str
        Label of the policy.
    budget : int or None
        Tokens kept a layer and KV head; None for the full cache.
    window, sinks : int
        Newest and oldest tokens that this policy never let go; 0 for the full cache.
    perplexity : float
        exp of the mean nats over the scored tokens of all sequences.
    sequences : tuple of SequenceRun
        The runs.
    """

    policy: str
    budget: int | None
    window: int
    sinks: int
    perplexity: float
    sequences: tuple[SequenceRun, ...]

    @property
    def kv_bytes(self) -> int:
        """Largest `SequenceRun.kv_bytes`."""
        return max(run.kv_bytes for run in self.sequences)

    @property
    def graph_bytes(self) -> int:
        """Largest `SequenceRun.graph_bytes`."""
        return max(run.graph_bytes for run in self.sequences)

    @property
    def seconds(self) -> float:
        """Wall-clock time of all sequences."""
        return sum(run.seconds for run in self.sequences)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The paired difference between two runs on the same tokens.

    Attributes
    ----------
    policy, baseline : str
        Labels of the policies.
    budget : int
        Budget of the policy's run; the baseline has the same or is the full cache.
    difference : PairedDifference
        Nats a token of the policy above the baseline; negative means the policy is better.
    """

    policy: str
    baseline: str
    budget: int
    difference: PairedDifference


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Streaming perplexity of several policies and budgets on the same tokens.

    Attributes
    ----------
    model : str
        Name of the model.
    chunk : int
        Tokens fed at a time.
    settings : CacheSettings
        What all policies shared; a window or sinks of None were each policy's own.
    first_scored : int
        Position of the first scored token, in every sequence.
    scored_tokens : int
        Scored tokens over all sequences.
    sequence_lengths : tuple of int
        Tokens of each sequence.
    runs : tuple of PolicyRun
        The full cache first.
    comparisons : tuple of Comparison
        Each run against the full cache, then each against the others at its budget.
    """

    model: str
    chunk: int
    settings: CacheSettings
    first_scored: int
    scored_tokens: int
    sequence_lengths: tuple[int, ...]
    runs: tuple[PolicyRun, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def full(self) -> PolicyRun:
        """The run with the full cache."""
        return self.runs[0]

    @property
    def sample_note(self) -> str:
        """One sentence on how far the numbers carry."""
        return sample_note(len(self.sequence_lengths), self.scored_tokens)

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers."""
        return {
            "model": self.model,
            "chunk": self.chunk,
            "interval": self.settings.interval,
            "first_scored": self.first_scored,
            "scored_tokens": self.scored_tokens,
            "sequence_lengths": list(self.sequence_lengths),
            "sample_note": self.sample_note,
            "runs": [
                {
                    "policy": run.policy,
                    "budget": run.budget,
                    "window": run.window,
                    "sinks": run.sinks,
                    "ppl": run.perplexity,
                    "kv_bytes": run.kv_bytes,
                    "graph_bytes": run.graph_bytes,
                    "seconds": run.seconds,
                    "sequences": [
                        {**asdict(sequence), "nll": [round(x, 6) for x in sequence.nll]}
                        for sequence in run.sequences
                    ],
                }
                for run in self.runs
            ],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }


def sample_note(sequences: int, scored_tokens: int) -> str:
    """Say in one sentence how far a perplexity of so many sequences and tokens carries."""
    if sequences == 1:
        return (
            f"One document, {scored_tokens:,} scored tokens: a small sample. It shows what happens "
            "on this text; it does not rank policies in general."
        )
    if sequences < 30:
        return (
            f"{sequences} sequences, {scored_tokens:,} scored tokens: a small sample; read the "
            "intervals, not the last digit."
        )
    return f"{sequences} sequences, {scored_tokens:,} scored tokens."


def stream(
    model: Any,
    token_ids: Sequence[int],
    cache: EvictingCache,
    *,
    chunk: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> Stream:
    """Feed a token sequence through a cache and keep every token's likelihood.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    token_ids : sequence of int
        N >= 1 token ids.
    cache : spectralkv.hf.EvictingCache
        Mutated: it ends up having seen all N tokens.
    chunk : int
        Tokens a forward pass.
    on_progress : callable, optional
        Called with (tokens fed, N) after each pass.

    Returns
    -------
    Stream
        N - 1 likelihoods, and the logits after the last token.

    Raises
    ------
    EvaluationError
        There are no tokens, or `chunk` is below 1.
    """
    return stream_batch(model, [token_ids], cache, chunk=chunk, on_progress=on_progress)[0]


def stream_batch(
    model: Any,
    sequences: Sequence[Sequence[int]],
    cache: EvictingCache,
    *,
    chunk: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Stream, ...]:
    """Feed token sequences of one length together through one cache.

    Each fares as it would alone, up to rounding: the cache cuts each on its own schedule. The
    device is waited for once, at the end.

    Parameters
    ----------
    model, cache, chunk
        See `stream`.
    sequences : sequence of sequence of int
        B >= 1 sequences of N >= 1 token ids.
    on_progress : callable, optional
        Called with (tokens of a sequence fed, N) after each pass.

    Returns
    -------
    tuple of Stream
        One a sequence; the time is an equal part of the batch's.

    Raises
    ------
    EvaluationError
        There are no tokens, the sequences differ in length, or `chunk` is below 1.
    """
    import torch

    if chunk < 1:
        raise EvaluationError(f"chunk must be at least 1 token, got {chunk}")
    if not sequences or not sequences[0]:
        raise EvaluationError("there are no tokens to feed")
    lengths = sorted({len(sequence) for sequence in sequences})
    if len(lengths) > 1:
        raise EvaluationError(f"the sequences of a batch must have one length, got {lengths}")
    start = time.perf_counter()
    try:
        nats, last = _feed(model, sequences, cache, chunk, on_progress)
    except torch.OutOfMemoryError:
        raise EvaluationError(
            f"{len(sequences)} sequences of {lengths[0]} tokens do not fit into the memory of "
            f"{model.device} together: run fewer at a time (--batch)"
        ) from None
    nll = nats.tolist()
    seconds = (time.perf_counter() - start) / len(sequences)
    return tuple(
        Stream(nll=tuple(row), next_logits=after, seconds=seconds)
        for row, after in zip(nll, last, strict=True)
    )


def _feed(
    model: Any,
    sequences: Sequence[Sequence[int]],
    cache: EvictingCache,
    chunk: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Any, Any]:
    """Return nats (B, N - 1), and the logits (B, V) after the last token, on the device."""
    import torch

    from spectralkv.hf import cache_argument

    ids = torch.tensor([list(sequence) for sequence in sequences], device=model.device)
    batch, total = ids.shape
    nats = torch.empty(batch, total - 1, device=ids.device)
    last = None
    with torch.no_grad():
        for begin in range(0, total, chunk):
            end = min(begin + chunk, total)
            logits = model(
                input_ids=ids[:, begin:end], **cache_argument(cache), use_cache=True
            ).logits  # (B, chunk, V); row i predicts token begin + i + 1
            targets = ids[:, begin + 1 : end + 1]
            count = targets.shape[1]
            nats[:, begin : begin + count] = _nats(logits[:, :count], targets)
            last = logits[:, -1]
            if on_progress is not None:
                on_progress(end, total)
    if last is None:  # pragma: no cover - the loop above runs at least once
        raise RuntimeError("no forward pass was made")
    return nats, last.float().clone()


def _nats(logits: Any, targets: Any) -> Any:
    """Return the nats (B, T) of `targets` under `logits` (B, T, V), in blocks: a copy is large."""
    import torch

    rows = logits.flatten(0, 1)
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    parts = [
        torch.nn.functional.cross_entropy(block.float(), wanted, reduction="none")
        for block, wanted in zip(rows.split(step), targets.flatten().split(step), strict=True)
    ]
    return torch.cat(parts).view(targets.shape)


class BudgetCheck:
    """An eviction callback that refuses a policy which keeps more or less than its budget.

    A tie that lets one policy keep a token more than the others would pass for a better policy.
    Where heads keep different numbers of tokens, the heads of all layers that were cut at once must
    keep the budget at most, on average.

    Parameters
    ----------
    label : str
        Name of the policy in the error.
    budget : int or None
        Slots that every eviction must keep, ascending and unique; None if none may happen.
    wait : bool
        Look at the slots at once, for which a CUDA device must be waited for. Otherwise `verify`
        does it for all evictions.
    """

    def __init__(self, label: str, budget: int | None, *, wait: bool = True) -> None:
        self._label = label
        self._budget = budget
        self._wait = wait
        self._ordered: list[Any] = []  # bool tensors, where the device is not waited for
        # Of heads that keep different numbers: by tokens seen, what each layer keeps, (B, Hkv).
        self._kept: dict[int, list[Any]] = {}

    def __call__(self, event: EvictionEvent) -> None:
        """Check one eviction.

        Raises
        ------
        RuntimeError
            The policy keeps something else.
        """
        keep = event.keep
        if self._budget is not None and event.is_divided:
            self._ordered.append(is_left_aligned(keep))
            self._kept.setdefault(event.tokens_seen, []).append((keep >= 0).sum(-1))
            return
        ordered = (keep[..., 1:] > keep[..., :-1]).all() & (keep[..., :1] >= 0).all()
        if self._wait or keep.device.type == "cpu" or keep.shape[-1] != self._budget:
            self._require(int(keep.shape[-1]), bool(ordered), f"layer {event.layer}")
        else:
            self._ordered.append(ordered)

    def verify(self) -> None:
        """Check the order of all slots that were not looked at yet.

        Raises
        ------
        RuntimeError
            The policy kept something else.
        """
        import torch

        kept, self._kept = self._kept, {}
        mean = most_kept(kept)
        if kept and (self._budget is None or mean > self._budget):
            raise RuntimeError(
                f"[perplexity] policy {self._label!r} must keep {self._budget} slots a head "
                f"on average, kept {mean:g}; this is a bug in the policy or the cache"
            )
        pending, self._ordered = self._ordered, []
        if pending:
            self._require(self._budget, bool(torch.stack(pending).all()), "some layer")

    def _require(self, kept: int | None, ordered: bool, where: str) -> None:
        if kept != self._budget or not ordered:
            raise RuntimeError(
                f"[perplexity] policy {self._label!r} must keep {self._budget} ascending, unique "
                f"slots at {where}, kept {kept}{'' if ordered else ' out of order'}; "
                "this is a bug in the policy or the cache"
            )


def is_left_aligned(keep: torch.Tensor) -> torch.Tensor:
    """Return whether lists (B, Hkv, M) are ascending, unique slots before their -1; a bool."""
    held = keep >= 0
    ordered = ((keep[..., 1:] > keep[..., :-1]) | ~held[..., 1:]).all()
    return ordered & (held[..., :-1] | ~held[..., 1:]).all()


def most_kept(cuts: Mapping[int, Sequence[torch.Tensor]]) -> float:
    """Return the most that heads ever kept on average.

    Parameters
    ----------
    cuts : mapping of int to sequence of torch.Tensor
        By tokens seen: what heads keep, (B, Hkv), of each layer that was cut then.
    """
    import torch

    means = [torch.stack(list(layers)).double().mean((0, 2)).max() for layers in cuts.values()]
    return float(torch.stack(means).max()) if means else 0.0


def exact_budget_check(label: str, budget: int | None) -> BudgetCheck:
    """Return a `BudgetCheck` that looks at every eviction at once."""
    return BudgetCheck(label, budget)


def scored_range(
    lengths: Sequence[int], budgets: Sequence[int], *, wanted: int | None = None
) -> int:
    """Return the position of the first scored token of a comparison.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each sequence.
    budgets : sequence of int
        All budgets that will be compared; empty for the full cache alone.
    wanted : int or None
        Where to begin, so that runs at other budgets score the same tokens; None: as early as
        possible.

    Returns
    -------
    int
        `wanted`, or ``max(budgets)`` and at least 1, since nothing predicts token 0.

    Raises
    ------
    EvaluationError
        `wanted` comes before the largest budget has filled, or a sequence is too short to leave
        `MIN_SCORED_TOKENS` tokens.
    """
    first = max(1, *budgets) if budgets else 1
    if wanted is not None:
        if wanted < first:
            raise EvaluationError(
                f"the first scored token must be {first} or later, where the largest budget has "
                f"filled, got {wanted}"
            )
        first = wanted
    shortest = min(lengths)
    if shortest - first < MIN_SCORED_TOKENS:
        raise EvaluationError(
            f"the text is too short: {shortest} tokens leave {max(0, shortest - first)} to score "
            f"from token {first} on, where all budgets have filled, at least {MIN_SCORED_TOKENS} "
            "are needed"
        )
    return first


def evaluate_perplexity(
    model: Any,
    sequences: Sequence[Sequence[int]],
    policies: Sequence[PolicySpec],
    budgets: Sequence[int],
    *,
    name: str,
    chunk: int = 32,
    batch: int = 1,
    settings: CacheSettings | None = None,
    on_progress: Progress | None = None,
) -> PerplexityResult:
    """Measure streaming perplexity for every policy at every budget, and the full cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    sequences : sequence of sequence of int
        Token ids; each sequence gets a fresh cache.
    policies : sequence of PolicySpec
        Policies; ``full`` is run once whether or not it is among them.
    budgets : sequence of int
        Tokens to keep a layer and KV head.
    name : str
        Name of the model for the report.
    chunk : int
        Tokens fed at a time.
    batch : int
        Sequences of one length that are fed together.
    settings : CacheSettings, optional
        Interval, window and sinks of every policy.
    on_progress : Progress, optional
        Called with (what runs, tokens fed, tokens of the run).

    Returns
    -------
    PerplexityResult
        All runs on the same scored tokens.

    Raises
    ------
    EvaluationError
        The texts are too short, or a policy refuses its arguments or the chunk.
    """
    settings = settings if settings is not None else CacheSettings()
    evicting = [spec for spec in policies if spec.name != FULL]
    specs: list[tuple[PolicySpec, int | None]] = [(PolicySpec(name=FULL), None)]
    specs += [(spec, budget) for spec in evicting for budget in budgets]
    lengths = [len(sequence) for sequence in sequences]
    first = scored_range(lengths, budgets if evicting else ())
    # All policies first: a bad argument is refused before the first minute is spent.
    plan = [(spec.label, create_policy(spec, budget, settings)) for spec, budget in specs]
    for label, policy in plan:
        check_chunk(label, policy, chunk)
    runs = tuple(
        _run(model, sequences, label, policy, chunk, batch, first, on_progress)
        for label, policy in plan
    )
    return PerplexityResult(
        model=name,
        chunk=chunk,
        settings=settings,
        first_scored=first,
        scored_tokens=sum(length - first for length in lengths),
        sequence_lengths=tuple(lengths),
        runs=runs,
        comparisons=compare(runs, first),
    )


def check_chunk(label: str, policy: Policy, chunk: int) -> None:
    """Check that texts which are fed `chunk` tokens at a time show what a policy does.

    Raises
    ------
    EvaluationError
        It has an option that is about decode steps, forward passes of one token, and there would
        be none.
    """
    from spectralkv.policies import Mix, Spectral

    parts = policy.parts() if isinstance(policy, Mix) else [policy]
    scans = [part.scan_interval for part in parts if isinstance(part, Spectral)]
    if chunk > 1 and max(scans, default=1) > 1:
        raise EvaluationError(
            f"{label}: scan_interval is about decode steps, for which chunk must be 1, got {chunk}"
        )


def collect(stream_result: Stream, cache: EvictingCache, *, batch: int = 1) -> SequenceRun:
    """Put a finished stream and its cache's statistics into one record.

    Parameters
    ----------
    stream_result : Stream
        Of one sequence.
    cache : spectralkv.hf.EvictingCache
        The cache it went through.
    batch : int
        Sequences of one length that went through it; each has an equal part of the bytes.
    """
    stats = cache.stats()
    return SequenceRun(
        nll=stream_result.nll,
        kv_bytes=-(-int(stats.kv_bytes) // batch),
        graph_bytes=-(-int(stats.graph_bytes) // batch),
        tokens_seen=int(stats.tokens_seen),
        tokens_kept=int(stats.tokens_kept),
        evictions=int(stats.evictions),
        seconds=stream_result.seconds,
    )


def run_batch(
    model: Any,
    sequences: Sequence[Sequence[int]],
    label: str,
    policy: Policy,
    *,
    chunk: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[SequenceRun, ...]:
    """Feed sequences of one length together through a fresh cache, and check every eviction.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    sequences : sequence of sequence of int
        Token ids, equally many of each.
    label : str
        What errors call the policy.
    policy : spectralkv.policies.Policy
        What the cache keeps.
    chunk : int
        Tokens fed at a time.
    on_progress : callable, optional
        Called with (tokens of a sequence fed, its tokens).

    Returns
    -------
    tuple of SequenceRun
        In the same order.

    Raises
    ------
    EvaluationError
        The sequences differ in length, or do not fit into the device's memory together.
    RuntimeError
        The policy did not keep its budget.
    """
    check = BudgetCheck(label, policy.budget, wait=False)
    cache = create_cache(model, policy, on_evict=check)
    streams = stream_batch(model, sequences, cache, chunk=chunk, on_progress=on_progress)
    check.verify()
    return tuple(collect(one, cache, batch=len(streams)) for one in streams)


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the indices of sequences that go together: of one length, at most `size`, in order.

    Raises
    ------
    EvaluationError
        `size` is below 1.
    """
    if size < 1:
        raise EvaluationError(f"batch must be at least 1 sequence, got {size}")
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def policy_run(
    label: str, policy: Policy, sequences: Sequence[SequenceRun], first: int
) -> PolicyRun:
    """Sum up the sequences of one policy at one budget."""
    scored = [nats for sequence in sequences for nats in sequence.scored(first)]
    return PolicyRun(
        policy=label,
        budget=policy.budget,
        window=0 if policy.budget is None else policy.protected_window,
        sinks=0 if policy.budget is None else policy.sinks,
        perplexity=math.exp(math.fsum(scored) / len(scored)),
        sequences=tuple(sequences),
    )


def compare(
    runs: Sequence[PolicyRun], first: int, *, corpora: Sequence[str] | None = None
) -> tuple[Comparison, ...]:
    """Return the paired differences of each run to the full cache and to its rivals.

    Parameters
    ----------
    runs : sequence of PolicyRun
        The full cache first.
    first : int
        Position of the first scored token.
    corpora : sequence of str, optional
        The corpus of each sequence: the strata of `paired_difference`.
    """
    full, evicting = runs[0], [run for run in runs[1:] if run.budget is not None]
    pairs = [(run, full) for run in evicting]
    pairs += [
        (run, rival)
        for i, run in enumerate(evicting)
        for rival in evicting[i + 1 :]
        if rival.budget == run.budget
    ]
    return tuple(
        Comparison(
            policy=run.policy,
            baseline=rival.policy,
            budget=run.budget,
            difference=paired_difference(
                [sequence.scored(first) for sequence in run.sequences],
                [sequence.scored(first) for sequence in rival.sequences],
                strata=corpora,
            ),
        )
        for run, rival in pairs
        if run.budget is not None
    )


def _run(
    model: Any,
    sequences: Sequence[Sequence[int]],
    label: str,
    policy: Policy,
    chunk: int,
    batch: int,
    first: int,
    on_progress: Progress | None,
) -> PolicyRun:
    title = label if policy.budget is None else f"{label} at {policy.budget}"
    total = sum(len(sequence) for sequence in sequences)
    records: dict[int, SequenceRun] = {}
    before = 0
    for group in batches_of([len(sequence) for sequence in sequences], batch):

        def report(done: int, _: int, before: int = before, count: int = len(group)) -> None:
            if on_progress is not None:
                on_progress(title, before + done * count, total)

        together = [sequences[index] for index in group]
        runs = run_batch(model, together, label, policy, chunk=chunk, on_progress=report)
        records.update(zip(group, runs, strict=True))
        before += sum(map(len, together))
    return policy_run(label, policy, [records[i] for i in range(len(sequences))], first)
