"""The perplexity study: many policies and budgets on the same tokens of several texts.

Every finished sequence is a case of a run file (`spectralkv.evaluation.runs`), so an interrupted
study goes on where it was. A case has:

``policy``, ``budget``, ``budget_fraction``
    Label, tokens kept a layer and KV head, and the share of the sequence that they are; both None
    for the full cache.
``corpus``, ``sequence``, ``length``, ``first_scored``
    Which tokens: the text, the number of the sequence in it (those skipped count), its tokens, and
    the position of the first that is scored.
``nats``, ``tokens``
    Sums of the nats of consecutive `BLOCK` scored tokens (the last block may be shorter), and how
    many tokens those are.
``kv_bytes``, ``graph_bytes``, ``tokens_kept``, ``evictions``, ``seconds``
    See `spectralkv.evaluation.perplexity.SequenceRun`.
``window``, ``sinks``
    Newest and oldest tokens that the policy never let go.
``limit``
    Whether it is a clairvoyant reference and not a policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.caches import CacheSettings, create_policy
from spectralkv.evaluation.datasets import token_sequences
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.perplexity import (
    PerplexityResult,
    PolicyRun,
    SequenceRun,
    batches_of,
    check_chunk,
    compare,
    run_batch,
    scored_range,
)
from spectralkv.evaluation.specs import FULL, Budget, PolicySpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spectralkv.evaluation.clairvoyant import Foresight
    from spectralkv.evaluation.datasets import Corpus, Tokenizer
    from spectralkv.evaluation.progress import Progress
    from spectralkv.evaluation.runs import RunFile
    from spectralkv.policies import Policy

#: Scored tokens whose nats a run file sums up.
BLOCK = 64

# The sequences of a text, by their number in it.
Sequences = Mapping[int, "Sequence[int]"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One policy at one budget, to be run on all sequences.

    Attributes
    ----------
    label : str
        Its name in the run file.
    policy : spectralkv.policies.Policy
        The policy.
    fraction : float or None
        The share of a sequence that was asked for as its budget; None: the budget was given in
        tokens, or there is none.
    figures : mapping
        Further figures of its cases.
    """

    label: str
    policy: Policy
    fraction: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def key(self, corpus: str, sequence: int) -> str:
        """Return the key of one of its cases."""
        budget = "full" if self.policy.budget is None else self.policy.budget
        return f"{self.label}|{budget}|{corpus}|{sequence}"


def policy_jobs(
    specs: Sequence[PolicySpec],
    budgets: Sequence[Budget],
    settings: CacheSettings,
    *,
    length: int,
) -> list[Job]:
    """Return the full cache and every policy at every budget.

    Parameters
    ----------
    specs : sequence of PolicySpec
        Policies; ``full`` comes once, and first, whether or not it is among them.
    budgets : sequence of Budget
        Budgets; those that are the same number of tokens count once.
    settings : CacheSettings
        Interval, window and sinks.
    length : int
        Tokens of the shortest sequence, of which fractions are taken.

    Raises
    ------
    EvaluationError
        A policy refuses its arguments, or a fraction is less than a token.
    """
    jobs = [Job(label=FULL, policy=create_policy(PolicySpec(name=FULL), None, settings))]
    for spec in dict.fromkeys(specs):
        if spec.name == FULL:
            continue
        for tokens, fraction in _resolved(budgets, length):
            policy = create_policy(spec, tokens, settings)
            jobs.append(Job(label=spec.label, policy=policy, fraction=fraction))
    return jobs


def limit_jobs(
    horizons: Sequence[int | None],
    budgets: Sequence[Budget],
    settings: CacheSettings,
    *,
    length: int,
    chunk: int,
) -> list[Job]:
    """Return the clairvoyant references at every budget.

    Parameters
    ----------
    horizons : sequence of int or None
        Tokens to look ahead; None: the whole future.
    budgets, settings, length
        See `policy_jobs`; without a window and sinks of `settings` those of Spectral.
    chunk : int
        Tokens fed at a time.

    Raises
    ------
    EvaluationError
        A horizon is not a positive multiple of the chunk, or a budget is too small.
    """
    from spectralkv.evaluation.clairvoyant import Clairvoyant

    for ahead in horizons:
        if ahead is not None and (ahead < 1 or ahead % chunk):
            raise EvaluationError(
                f"a clairvoyant reference looks ahead a multiple of the chunk of {chunk} tokens, "
                f"got {ahead}"
            )
    given = {"interval": settings.interval, "window": settings.window, "sinks": settings.sinks}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    jobs = []
    for ahead in dict.fromkeys(horizons):
        for tokens, fraction in _resolved(budgets, length):
            try:
                policy = Clairvoyant(budget=tokens, ahead=ahead, **options)
            except ValueError as error:
                raise EvaluationError(str(error)) from error
            jobs.append(Job(label=policy.label, policy=policy, fraction=fraction))
    return jobs


def run_study(
    model: Any,
    corpora: Mapping[str, Sequences],
    jobs: Sequence[Job],
    run: RunFile,
    *,
    first: int,
    chunk: int = 32,
    batch: int = 1,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Run every job on every sequence that the run file does not have yet.

    Batch by batch: all jobs on the first sequences, then on the next, so that what is there is
    paired from the beginning.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    corpora : mapping of str to mapping of int to sequence of int
        Token ids of the sequences by the name of the text and their number in it.
    jobs : sequence of Job
        What to run.
    run : RunFile
        Takes the cases.
    first : int
        Position of the first scored token, see `spectralkv.evaluation.perplexity.scored_range`.
    chunk : int
        Tokens fed at a time.
    batch : int
        Sequences of one length that are fed together.
    known : mapping, optional
        Cases of other run files, by key: the same job on the same tokens is not run again.
    on_progress : Progress, optional
        Called with (what runs, tokens fed, tokens in all).

    Raises
    ------
    EvaluationError
        A policy refuses the chunk, a batch does not fit into memory, or the run file cannot be
        written.
    """
    for job in jobs:
        check_chunk(job.label, job.policy, chunk)
    if known is not None:
        for job in jobs:
            for name, numbers in corpora.items():
                for number in numbers:
                    key = job.key(name, number)
                    if key in known and not run.done(key):
                        old = {k: v for k, v in known[key].items() if k != "key"}
                        run.add(key, **(old | dict(job.figures)))
    units = [
        (name, number, ids) for name, numbers in corpora.items() for number, ids in numbers.items()
    ]
    left = [
        len(ids)
        for name, number, ids in units
        for job in jobs
        if not run.done(job.key(name, number))
    ]
    done, total = 0, sum(left)
    for group in batches_of([len(ids) for _, _, ids in units], batch):
        foresight = _Foresights(model, chunk)
        for job in jobs:
            pending = [units[i] for i in group if not run.done(job.key(units[i][0], units[i][1]))]
            if not pending:
                continue
            sequences = [ids for _, _, ids in pending]

            def report(fed: int, _: int, done: int = done, count: int = len(pending)) -> None:
                if on_progress is not None:
                    on_progress("tokens", done + fed * count, total)

            policy = foresight.given_to(job.policy, sequences)
            records = run_batch(
                model, sequences, job.label, policy, chunk=chunk, on_progress=report
            )
            for (name, number, ids), record in zip(pending, records, strict=True):
                run.add(
                    job.key(name, number),
                    **_figures(job, name, number, ids, record, first),
                    **job.figures,
                )
            done += sum(map(len, sequences))


def result_of(
    run: RunFile, *, model: str, chunk: int, settings: CacheSettings, first: int
) -> PerplexityResult:
    """Return a finished run as tables and pictures take it.

    The file knows sums over `BLOCK` tokens, so each token of the result has the mean of its block;
    tokens before `first` are NaN.

    Parameters
    ----------
    run : RunFile
        A run of all its jobs.
    model : str
        Name of the model.
    chunk : int
        Tokens fed at a time.
    settings : CacheSettings
        Interval, window and sinks.
    first : int
        Position of the first scored token.
    """
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for case in run.cases:
        groups.setdefault((case["policy"], case["budget"]), []).append(case)
    for cases in groups.values():
        cases.sort(key=lambda case: (case["corpus"], case["sequence"]))
    runs = []
    for (label, budget), cases in groups.items():
        nats = math.fsum(x for case in cases for x in nats_of(case))
        runs.append(
            PolicyRun(
                policy=label,
                budget=budget,
                window=cases[0]["window"],
                sinks=cases[0]["sinks"],
                perplexity=math.exp(nats / sum(case["tokens"] for case in cases)),
                sequences=tuple(_sequence_run(case) for case in cases),
            )
        )
    runs.sort(key=lambda one: one.budget is not None)
    full = groups[runs[0].policy, None]
    return PerplexityResult(
        model=model,
        chunk=chunk,
        settings=settings,
        first_scored=first,
        scored_tokens=sum(case["tokens"] for case in full),
        sequence_lengths=tuple(case["length"] for case in full),
        runs=tuple(runs),
        comparisons=compare(runs, first, corpora=[case["corpus"] for case in full]),
    )


def nats_of(case: Mapping[str, Any]) -> list[float]:
    """Return the sums of a case; JSON has no NaN, so a file has null in its place."""
    return [math.nan if nats is None else nats for nats in case["nats"]]


def cut_corpora(
    tokenizer: Tokenizer,
    corpora: Sequence[Corpus],
    *,
    length: int,
    count: int = 1,
    skip: int = 0,
    stride: int | None = None,
) -> dict[str, Sequences]:
    """Cut each text into sequences, see `spectralkv.evaluation.datasets.token_sequences`.

    Returns
    -------
    dict of str to dict of int to tuple of int
        Token ids by the name of the text and the number of the sequence in it, from `skip` on.

    Raises
    ------
    EvaluationError
        An argument is out of range, or a text, which is named, has too few tokens.
    """
    cut: dict[str, Sequences] = {}
    for corpus in corpora:
        try:
            sequences = token_sequences(
                tokenizer, corpus.text, length=length, count=count, skip=skip, stride=stride
            )
        except EvaluationError as error:
            raise EvaluationError(f"{corpus.name}: {error}") from None
        cut[corpus.name] = dict(enumerate(sequences, start=skip))
    return cut


def sequence_lengths(corpora: Mapping[str, Sequences]) -> list[int]:
    """Return the tokens of each sequence, text by text."""
    return [len(ids) for numbers in corpora.values() for ids in numbers.values()]


def check_context(model: Any, corpora: Mapping[str, Sequences]) -> None:
    """Refuse sequences that are longer than the model was made for.

    Raises
    ------
    EvaluationError
        There is one: past its context a model's perplexity tells nothing about caches.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(sequence_lengths(corpora))
    if context is not None and longest > context:
        raise EvaluationError(
            f"the model reads at most {context} tokens, got a sequence of {longest}"
        )


def first_scored(
    corpora: Mapping[str, Sequences], jobs: Sequence[Job], *, wanted: int | None = None
) -> int:
    """Return the position of the first scored token, the same for all jobs and sequences.

    Parameters
    ----------
    corpora : mapping
        Sequences by the name of their text.
    jobs : sequence of Job
        What will run.
    wanted : int or None
        The position, if it is to be later than where the largest budget has filled.

    Raises
    ------
    EvaluationError
        A sequence is too short for the largest budget, or `wanted` comes before it.
    """
    budgets = [job.policy.budget for job in jobs if job.policy.budget is not None]
    return scored_range(sequence_lengths(corpora), budgets, wanted=wanted)


class _Foresights:
    """What a batch's sequences will attend to: found out once, for all clairvoyant jobs."""

    def __init__(self, model: Any, chunk: int) -> None:
        self._model = model
        self._chunk = chunk
        self._sequences: list[Sequence[int]] = []
        self._foresight: Foresight | None = None

    def given_to(self, policy: Policy, sequences: list[Sequence[int]]) -> Policy:
        from spectralkv.evaluation.clairvoyant import Clairvoyant, foresee

        if not isinstance(policy, Clairvoyant):
            return policy
        if self._foresight is None or self._sequences != sequences:
            self._foresight = None  # the former one's memory
            self._foresight = foresee(self._model, sequences, chunk=self._chunk)
            self._sequences = sequences
        return policy.seeing(self._foresight)


def _resolved(budgets: Sequence[Budget], length: int) -> list[tuple[int, float | None]]:
    """Return tokens and fraction of each budget, ascending, each number of tokens once."""
    found: dict[int, float | None] = {}
    for budget in budgets:
        found.setdefault(budget.resolve(length), budget.fraction)
    return sorted(found.items())


def _figures(
    job: Job, corpus: str, sequence: int, ids: Sequence[int], record: SequenceRun, first: int
) -> dict[str, Any]:
    budget, length = job.policy.budget, len(ids)
    scored = record.scored(first)
    fraction = job.fraction
    if fraction is None and budget is not None:
        fraction = round(budget / length, 6)
    return {
        "policy": job.label,
        "budget": budget,
        "budget_fraction": fraction,
        "corpus": corpus,
        "sequence": sequence,
        "length": length,
        "first_scored": first,
        "nats": [round(math.fsum(scored[i : i + BLOCK]), 6) for i in range(0, len(scored), BLOCK)],
        "tokens": len(scored),
        "kv_bytes": record.kv_bytes,
        "graph_bytes": record.graph_bytes,
        "tokens_kept": record.tokens_kept,
        "evictions": record.evictions,
        "seconds": round(record.seconds, 4),
        "window": 0 if budget is None else job.policy.protected_window,
        "sinks": 0 if budget is None else job.policy.sinks,
        "limit": job.policy.name == "clairvoyant",
    }


def _sequence_run(case: Mapping[str, Any]) -> SequenceRun:
    nll = [math.nan] * (case["first_scored"] - 1)
    left = case["tokens"]
    for nats in nats_of(case):
        count = min(BLOCK, left)
        nll += [nats / count] * count
        left -= count
    return SequenceRun(
        nll=tuple(nll),
        kv_bytes=case["kv_bytes"],
        graph_bytes=case["graph_bytes"],
        tokens_seen=case["length"],
        tokens_kept=case["tokens_kept"],
        evictions=case["evictions"],
        seconds=case["seconds"],
    )
