"""The oracle: whether PageRank on the attention keeps the right tokens if all of it is known.

A text of N + M + 1 tokens goes through the full cache once, and all of its attention is captured;
see `spectralkv.evaluation.capture`. Then the first N tokens, the context, are judged in retrospect:
in every layer and KV head each method chooses the tokens that stay from what all N tokens paid to
each other. Nothing has been evicted before, so all methods judge the same, complete evidence.

The M tokens that follow are fed to a cache from which the keys and values of all others are gone,
and the M tokens they predict are scored. No method sees what those tokens attend to but
`CLAIRVOYANT`, which is a limit and no policy. Two questions are asked:

*all layers*
    every layer is cut. This is the price of a cache that holds `budget` tokens a head.
*one layer*
    one layer is cut and the others are whole: which layers PageRank serves better than H2O.

The context was read with the whole cache, so what is measured is the choice alone. How an error of
a policy feeds on itself when evictions follow one another is for the streaming evaluation.

Graphs
------
A token's row holds the `top_k` tokens before it that it paid most, sinks and itself left out, as
`spectralkv.GraphManager` draws them from queries and keys. Here the rows come from the capture:

``pagerank``
    the library's exact solver, with the restarts, counts and shares of the preset;
``pagerank walk``
    its random walks on the same graph;
``pagerank dense``
    the same on all edges instead of `top_k`, by a triangular solver of its own.

networkx computes the personalized PageRank of the same graphs (`networkx.from_numpy_array`,
`networkx.pagerank`) for some heads, and the ranks must agree.

Cases of the run file
---------------------
``{sequence}|{policy}|all`` and ``{sequence}|{policy}|{layer}``
    ``case`` "perplexity"; ``policy`` (a method, or ``full``), ``layer`` (None: all), ``corpus``,
    ``sequence`` (counted over all texts),
    ``budget``, ``budget_fraction``, ``nats`` (sums over blocks of `BLOCK` scored tokens, the last
    one may be short), ``tokens`` and ``limit`` (True for `CLAIRVOYANT`).
``{sequence}|agreement|{layer}|{head}``
    ``case`` "agreement"; ``spearman``: the lowest rank correlation over the populations between
    networkx and the exact solver on the graph of `top_k` edges; ``spearman_dense`` between
    networkx and the triangular solver on all edges (None where it was not asked for);
    ``seconds`` that networkx took.
``{sequence}|overlap|{layer}``
    ``case`` "overlap"; ``walk`` and ``dense``: of the tokens that the exact solver keeps by their
    score, the share that the method keeps, too.
``{sequence}|check``
    ``case`` "check"; ``capture_bytes``; ``nats_apart``: the largest difference of a scored
    token's nats between the pass that was captured and the pass through a cache of this module
    that holds everything, which should be rounding alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.capture import Capture, CapturePlan, Pass, capture_attention
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.oracle_graph import (
    CLAIRVOYANT,
    H2O,
    LAYER_METHODS,
    METHODS,
    PAGERANK,
    LayerGraph,
    require_networkx,
)
from spectralkv.evaluation.specs import FULL, Budget
from spectralkv.evaluation.statistics import PairedDifference, paired_difference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spectralkv.config import EdgeLaw
    from spectralkv.evaluation.progress import Progress
    from spectralkv.evaluation.runs import RunFile

#: Scored tokens a block of ``nats``.
BLOCK = 64
#: Ranks of the same graph must agree better than this.
LEAST_AGREEMENT = 0.999

#: Longest context whose whole graph networkx takes: it needs some 250 bytes an edge, of which there
#: are half as many as the square of the tokens.
MOST_DENSE_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """What the oracle does.

    Attributes
    ----------
    context : int
        N: tokens that are judged.
    continuation : int
        M: tokens that are scored.
    budget : Budget
        What each KV head keeps of the context.
    layers : tuple of int or None
        Layers that are also cut alone. None: each that can evict.
    heads : int
        (layer, head) pairs a sequence whose graph networkx ranks, evenly spread.
    dense_heads : int
        How many of them on all edges as well, which takes networkx some 20 seconds at 2,048 tokens.
    preset : str
        Edge law, `top_k` and populations by name; see `spectralkv.config.apply_preset`.
    edge_law : {"uniform", "weighted", "attention"} or None
        Used instead of the preset's.
    window, sinks : int
        Newest and oldest tokens that all methods but H2O keep.
    chunk : int
        Tokens fed at a time.
    seed : int
        Of the walks.
    """

    context: int = 2048
    continuation: int = 512
    budget: Budget = field(default_factory=lambda: Budget(fraction=0.2))
    layers: tuple[int, ...] | None = None
    heads: int = 6
    dense_heads: int = 1
    preset: str = "default"
    edge_law: EdgeLaw | None = None
    window: int = 50
    sinks: int = 4
    chunk: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 1),
            ("continuation", BLOCK),
            ("heads", 0),
            ("dense_heads", 0),
            ("window", 0),
            ("sinks", 0),
            ("chunk", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise EvaluationError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.dense_heads and self.context > MOST_DENSE_TOKENS:
            raise EvaluationError(
                f"dense_heads must be 0 for a context above {MOST_DENSE_TOKENS:,} tokens, whose "
                f"whole graph is too large for networkx, got {self.dense_heads} for "
                f"{self.context:,}"
            )
        least = self.sinks + self.window + 1
        if not least <= self.kept < self.context:
            raise EvaluationError(
                f"budget must be at least sinks + window + 1 = {least} and below the context of "
                f"{self.context} tokens, got {self.kept}"
            )

    @property
    def kept(self) -> int:
        """The budget in tokens."""
        return self.budget.resolve(self.context)

    @property
    def sequence_length(self) -> int:
        """Tokens that a sequence must have: context, continuation, and one more to predict."""
        return self.context + self.continuation + 1


def settings_of(config: OracleConfig) -> dict[str, Any]:
    """Return the entries of a run file's config that stand for `config`: plain values."""
    return {
        "length": config.context,
        "continuation": config.continuation,
        "budget": config.kept,
        "layers": None if config.layers is None else list(config.layers),
        "heads": config.heads,
        "dense_heads": config.dense_heads,
        "preset": config.preset,
        "edge_law": config.edge_law,
        "window": config.window,
        "sinks": config.sinks,
        "chunk": config.chunk,
        "seed": config.seed,
    }


def plan_oracle(model: Any, config: OracleConfig) -> CapturePlan:
    """Return what capturing one sequence takes.

    Raises
    ------
    EvaluationError
        The model's attention cannot be watched, or it has not the layers that are asked for.
    """
    plan = CapturePlan.of(
        model,
        boundary=config.context,
        tokens=config.context + config.continuation,
        chunk=config.chunk,
    )
    missing = [layer for layer in config.layers or () if layer not in plan.layers]
    if missing:
        raise EvaluationError(
            f"layers must be among those that can evict, {', '.join(map(str, plan.layers))}, "
            f"got {', '.join(map(str, missing))}"
        )
    return plan


@dataclass(frozen=True, kw_only=True)
class OracleText:
    """A sequence of a text.

    Attributes
    ----------
    corpus : str
        Name of the text.
    tokens : tuple of int
        ``config.sequence_length`` token ids.
    """

    corpus: str
    tokens: tuple[int, ...]

    def identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return `identity` and a digest of the tokens: what decides the attention."""
        digest = hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()
        return {**identity, "tokens_sha256": digest}


def run_oracle(
    model: Any,
    texts: Sequence[OracleText],
    config: OracleConfig,
    run: RunFile,
    folder: Path,
    *,
    identity: Mapping[str, Any],
    on_progress: Progress | None = None,
) -> None:
    """Capture each sequence, cut it in retrospect, and record what comes out.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    texts : sequence of OracleText
        The sequences.
    config : OracleConfig
        What to do.
    run : RunFile
        Where the cases go; those that it has are not done again.
    folder : pathlib.Path
        Where the captures go, a folder a sequence.
    identity : mapping
        What decides the attention beside the tokens and the chunks: plain values.
    on_progress : Progress, optional
        Called with (what runs, steps done, steps).

    Raises
    ------
    EvaluationError
        A sequence has another length, or the disk lacks the space.
    MissingDependencyError
        networkx, scipy or safetensors is not installed.
    """
    if config.heads or config.dense_heads:
        require_networkx()
    for text in texts:
        if len(text.tokens) != config.sequence_length:
            raise EvaluationError(
                f"the oracle needs sequences of {config.sequence_length} tokens, "
                f"got {len(text.tokens)} of {text.corpus}"
            )
    plan = plan_oracle(model, config)
    work = {
        index: (text, folder / f"sequence-{index:03d}", text.identity(identity))
        for index, text in enumerate(texts)
        if not _is_complete(run, index, plan, config)
    }
    new = [about for _, place, about in work.values() if Capture.find(place, about, plan) is None]
    plan.check_space(folder, len(new))
    for index, (text, place, about) in work.items():
        steps = _Steps(on_progress, f"{text.corpus}, sequence {index + 1} of {len(texts)}")
        whole = capture_attention(
            model,
            text.tokens,
            place,
            plan=plan,
            boundary=config.context,
            config=about,
            on_progress=steps.of("reading and capturing"),
        )
        _judge(model, text, whole, Capture(place), config, plan, run, index, steps)


class _Steps:
    """Progress of the stages of one sequence."""

    def __init__(self, on_progress: Progress | None, title: str) -> None:
        self._on_progress, self._title = on_progress, title

    def of(self, stage: str) -> Any:
        def report(done: int, total: int) -> None:
            if self._on_progress is not None:
                self._on_progress(f"{self._title}: {stage}", done, total)

        return report


def _key(sequence: int, policy: str, layer: int | None) -> str:
    return f"{sequence}|{policy}|{'all' if layer is None else layer}"


def _verdict_layers(plan: CapturePlan, config: OracleConfig) -> tuple[int, ...]:
    return plan.layers if config.layers is None else config.layers


def _sampled(plan: CapturePlan, count: int) -> list[tuple[int, int]]:
    """Return (layer, head) pairs, evenly spread over the layers, the heads in turn."""
    pairs = [(layer, head) for layer in plan.layers for head in range(plan.heads)]
    count = min(count, len(pairs))
    return [pairs[(2 * i + 1) * len(pairs) // (2 * count)] for i in range(count)]


def _is_complete(run: RunFile, index: int, plan: CapturePlan, config: OracleConfig) -> bool:
    keys = [f"{index}|check", *(_key(index, policy, None) for policy in (FULL, *METHODS))]
    keys += [
        _key(index, policy, layer)
        for layer in _verdict_layers(plan, config)
        for policy in LAYER_METHODS
    ]
    keys += [f"{index}|overlap|{layer}" for layer in plan.layers]
    keys += [f"{index}|agreement|{layer}|{head}" for layer, head in _sampled(plan, config.heads)]
    return all(map(run.done, keys))


def _judge(
    model: Any,
    text: OracleText,
    whole: Pass,
    capture: Capture,
    config: OracleConfig,
    plan: CapturePlan,
    run: RunFile,
    index: int,
    steps: _Steps,
) -> None:
    """Choose in every layer, compare with networkx, then score what is left."""
    import torch

    from spectralkv.hf.rotary import rotary_of

    text_config = model.config.get_text_config(decoder=True)
    sparse = _sampled(plan, config.heads)
    dense = sparse[: config.dense_heads]
    keep: dict[int, dict[str, Any]] = {}
    choosing = steps.of("choosing the tokens")
    for order, layer in enumerate(plan.layers):
        keys = whole.cache.layers[layer].keys[:, :, : config.context]
        graph = LayerGraph(
            capture.layer(layer, device=str(keys.device)),
            keys,
            config,
            layer=order,
            rotary=rotary_of(text_config, layer),
        )
        keep[layer] = graph.choices()
        overlap = f"{index}|overlap|{layer}"
        if not run.done(overlap):
            run.add(overlap, case="overlap", sequence=index, layer=layer, **graph.overlaps())
        for head in range(plan.heads):
            name = f"{index}|agreement|{layer}|{head}"
            if (layer, head) in sparse and not run.done(name):
                figures = graph.agreement(head, dense=(layer, head) in dense)
                run.add(name, case="agreement", sequence=index, layer=layer, head=head, **figures)
        choosing(order + 1, len(plan.layers))

    first = config.context
    ids = torch.tensor([text.tokens[first:]], dtype=torch.long, device=model.device)
    cuts: list[tuple[int | None, tuple[str, ...]]] = [(None, (FULL,)), (None, METHODS)]
    cuts += [(layer, LAYER_METHODS) for layer in _verdict_layers(plan, config)]
    scoring = steps.of("scoring what is left")
    for done, (only, policies) in enumerate(cuts):
        if not all(run.done(_key(index, policy, only)) for policy in policies):
            cut = plan.layers if only is None else (only,)
            chosen = (
                {}
                if policies == (FULL,)
                else {at: torch.stack([keep[at][policy] for policy in policies]) for at in cut}
            )
            nll = continuation_nats(
                model,
                whole,
                ids,
                context=first,
                keep=chosen,
                rows=len(policies),
                chunk=config.chunk,
            )
            for policy, nats in zip(policies, nll, strict=True):
                name = _key(index, policy, only)
                if not run.done(name):
                    is_full = policy == FULL
                    run.add(
                        name,
                        case="perplexity",
                        policy=policy,
                        layer=only,
                        corpus=text.corpus,
                        sequence=index,
                        budget=None if is_full else config.kept,
                        budget_fraction=None if is_full else config.kept / config.context,
                        nats=[round(float(block.sum()), 6) for block in nats.split(BLOCK)],
                        tokens=int(nats.shape[0]),
                        limit=policy == CLAIRVOYANT,
                    )
            if policies == (FULL,) and not run.done(f"{index}|check"):
                apart = (nll[0] - whole.nll[first:].to(nll.device)).abs().max()
                run.add(
                    f"{index}|check",
                    case="check",
                    sequence=index,
                    capture_bytes=capture.nbytes,
                    nats_apart=float(apart),
                )
        scoring(done + 1, len(cuts))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """PageRank against H2O, in one layer or in all.

    Attributes
    ----------
    layer : int or None
        The layer that was cut; None: every layer was.
    perplexity : dict of str to float
        Of each method on the tokens that were scored; ``full`` is the whole cache.
    difference : PairedDifference
        Nats a token of PageRank above H2O; negative means that PageRank is better.
    """

    layer: int | None
    perplexity: dict[str, float]
    difference: PairedDifference

    @property
    def is_better(self) -> bool:
        """Whether PageRank's perplexity is below H2O's."""
        return self.difference.mean < 0

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0


def verdicts(
    cases: Sequence[Mapping[str, Any]], *, policy: str = PAGERANK, rival: str = H2O
) -> list[Verdict]:
    """Compare two methods on the cases of a run file.

    Parameters
    ----------
    cases : sequence of mapping
        The cases; sequences that lack a method are left out.
    policy, rival : str
        The methods.

    Returns
    -------
    list of Verdict
        All layers first, then each layer that was cut alone; only those that both methods have.
    """
    scored: dict[int | None, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for case in cases:
        if case.get("case") == "perplexity":
            methods = scored.setdefault(case["layer"], {})
            methods.setdefault(case["policy"], {})[case["sequence"]] = case
    whole = scored.get(None, {}).get(FULL, {})
    found = []
    for layer in sorted(scored, key=lambda layer: -1 if layer is None else layer):
        methods = {FULL: whole, **scored[layer]} if whole else scored[layer]
        if not {policy, rival} <= set(methods):
            continue
        shared = sorted(set.intersection(*(set(rows) for rows in methods.values())))
        if not shared:
            continue
        rows = {name: [by_sequence[i] for i in shared] for name, by_sequence in methods.items()}
        tokens = [case["tokens"] for case in rows[policy]]
        found.append(
            Verdict(
                layer=layer,
                perplexity={
                    name: math.exp(
                        math.fsum(x for case in some for x in case["nats"]) / sum(tokens)
                    )
                    for name, some in rows.items()
                },
                difference=paired_difference(
                    [case["nats"] for case in rows[policy]],
                    [case["nats"] for case in rows[rival]],
                    tokens=tokens,
                    strata=[case["corpus"] for case in rows[policy]],
                    block=BLOCK,
                ),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the solvers agree.

    Attributes
    ----------
    lowest, lowest_dense : float or None
        Lowest rank correlation of networkx with the exact solver on the same graph, and with the
        triangular solver on all edges; None: networkx was not asked.
    heads, dense_heads : int
        Heads, of all sequences, that networkx was asked about.
    walk, dense : float or None
        Of the tokens that the exact solver chose, the mean share that the walks choose, and that
        PageRank on all edges chooses, over all layers.
    """

    lowest: float | None
    lowest_dense: float | None
    heads: int
    dense_heads: int
    walk: float | None
    dense: float | None

    @property
    def holds(self) -> bool:
        """Whether every correlation is above `LEAST_AGREEMENT`; true where none was measured."""
        return all(
            value is None or value > LEAST_AGREEMENT for value in (self.lowest, self.lowest_dense)
        )


def agreement(cases: Sequence[Mapping[str, Any]]) -> Agreement:
    """Sum up the cases "agreement" and "overlap" of a run file."""
    asked = [case for case in cases if case.get("case") == "agreement"]
    overlaps = [case for case in cases if case.get("case") == "overlap"]
    # A correlation that is no number, which the file holds as null, must not pass for agreement.
    sparse = [-1.0 if case["spearman"] is None else case["spearman"] for case in asked]
    dense = [case["spearman_dense"] for case in asked if case["spearman_dense"] is not None]
    return Agreement(
        lowest=min(sparse, default=None),
        lowest_dense=min(dense, default=None),
        heads=len(sparse),
        dense_heads=len(dense),
        walk=_mean([case["walk"] for case in overlaps]),
        dense=_mean([case["dense"] for case in overlaps]),
    )


def verdict_lines(results: Sequence[Verdict], found: Agreement) -> list[str]:
    """Say what the figures say.

    Parameters
    ----------
    results : sequence of Verdict
        From `verdicts`.
    found : Agreement
        From `agreement`.

    Returns
    -------
    list of str
        Sentences, a line each: all layers, layers one by one, and the solvers.
    """
    lines = []
    for result in results:
        if result.layer is None:
            pair, ppl = result.difference, result.perplexity
            lines.append(
                f"All layers: PPL(PageRank) {'<' if result.is_better else 'is NOT <'} PPL(H2O): "
                f"{ppl[PAGERANK]:.3f} and {ppl[H2O]:.3f}, {pair.mean:+.4f} nats a token, "
                f"{pair.confidence:.0%} interval {pair.low:+.4f} to {pair.high:+.4f} over "
                f"{pair.units} {pair.unit}"
                f"{'' if result.is_clear else ', which includes no difference'}"
                f"{'; a small sample' if pair.small_sample else ''}."
            )
    alone = [result for result in results if result.layer is not None]
    if alone:
        better = [result for result in alone if result.is_better]
        worse = [result for result in alone if not result.is_better]
        lines.append(
            f"One layer at a time: PPL(PageRank) < PPL(H2O) in {len(better)} of {len(alone)} "
            f"layers, {sum(r.is_clear for r in better)} of them with an interval clear of 0; "
            f"not in {len(worse)}, {sum(r.is_clear for r in worse)} of them clearly."
        )
    if found.lowest is not None:
        dense = (
            ""
            if found.lowest_dense is None
            else f", and on all edges {found.lowest_dense:.6f} over {found.dense_heads}"
        )
        lines.append(
            f"networkx and the exact solver rank the same graph alike: Spearman at least "
            f"{found.lowest:.6f} over {found.heads} heads{dense}."
            if found.holds
            else "THE SOLVERS DISAGREE: networkx and this library must rank the same graph alike, "
            f"Spearman above {LEAST_AGREEMENT}; the lowest is {found.lowest:.6f} over "
            f"{found.heads} heads{dense}."
        )
    if found.walk is not None and found.dense is not None:
        lines.append(
            f"Of the tokens that the exact solver chooses, the walks choose {found.walk:.1%}, "
            f"PageRank on all edges {found.dense:.1%}."
        )
    return lines


def _nats(cases: Sequence[Mapping[str, Any]]) -> float:
    return math.fsum(nats for case in cases for nats in case["nats"])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def continuation_nats(
    model: Any,
    whole: Pass,
    ids: Any,
    *,
    context: int,
    keep: Mapping[int, Any],
    rows: int,
    chunk: int,
) -> Any:
    """Score a continuation after a cut.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    whole : Pass
        The pass through the full cache; not changed.
    ids : torch.Tensor
        int64 (1, M + 1): the tokens from position `context` on. M are fed, and M predicted.
    context : int
        N: tokens of which something may have been let go.
    keep : mapping of int to torch.Tensor
        int64 (rows, Hkv, kept) a layer: positions that stay. Layers that are not named stay whole.
    rows : int
        Cuts that are scored at once.
    chunk : int
        Tokens fed at a time.

    Returns
    -------
    torch.Tensor
        float32 (rows, M): nats of each predicted token, on the CPU.
    """
    import torch

    from spectralkv.evaluation.oracle_caches import kept_cache
    from spectralkv.hf import cache_argument

    cache = kept_cache(whole.cache, whole.others, tokens=context, keep=keep, batch=rows)
    fed = ids.shape[1] - 1
    nll = []
    with torch.no_grad():
        for start in range(0, fed, chunk):
            end = min(start + chunk, fed)
            inputs = ids[:, start:end].expand(rows, -1)
            position = torch.arange(context + start, context + end, device=ids.device)[None]
            out = model(
                input_ids=inputs,
                position_ids=position.expand(rows, -1),
                **cache_argument(cache),
                use_cache=True,
            )
            targets = ids[:, start + 1 : end + 1].expand(rows, -1)
            # A row at a time: all logits in float32 would be the largest tensor of the run.
            nll.append(
                torch.stack(
                    [
                        torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
                        for logits, target in zip(out.logits, targets, strict=True)
                    ]
                )
            )
    return torch.cat(nll, 1).cpu()
