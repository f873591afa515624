"""The demonstration: one document, the full cache against H2O and Spectral at a fifth of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation import plots, report
from spectralkv.evaluation.caches import CacheSettings, create_cache, create_policy
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.generation import Generation, Sampling, continue_text, token_pieces
from spectralkv.evaluation.heatmap import EvictionRecorder, HeatMap
from spectralkv.evaluation.perplexity import (
    PerplexityResult,
    collect,
    compare,
    exact_budget_check,
    policy_run,
    scored_range,
    stream,
)
from spectralkv.evaluation.specs import FULL, Budget, PolicySpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spectralkv.evaluation.models import LoadedModel
    from spectralkv.evaluation.progress import Progress
    from spectralkv.hf import EvictionEvent

SPECTRAL, H2O = "spectral", "h2o"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demonstration does.

    Attributes
    ----------
    prompt_tokens : int
        Tokens of the document that are read.
    budget : Budget
        What Spectral and H2O may keep.
    new_tokens : int
        Tokens each cache continues the document by.
    chunk : int
        Tokens fed at a time.
    settings : CacheSettings
        Interval, window and sinks. By default Spectral has its own, and H2O what its paper has:
        half of the budget for the heaviest tokens, half for the most recent, no sinks.
    """

    prompt_tokens: int = 2048
    budget: Budget = field(default_factory=lambda: Budget(fraction=0.2))
    new_tokens: int = 64
    chunk: int = 32
    settings: CacheSettings = field(default_factory=CacheSettings)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What came out.

    Attributes
    ----------
    perplexity : PerplexityResult
        The runs ``full``, ``h2o`` and ``spectral``, in this order.
    budget : int
        The budget in tokens.
    continuations : tuple of Generation
        How each run continued the document, in the same order.
    heat : HeatMap
        What Spectral recorded.
    new_tokens : int
        Tokens decoded by each run.
    """

    perplexity: PerplexityResult
    budget: int
    continuations: tuple[Generation, ...]
    heat: HeatMap
    new_tokens: int

    @property
    def spectral_beats_h2o(self) -> bool:
        """Whether Spectral's perplexity came out below H2O's on this document."""
        _, h2o, spectral = self.perplexity.runs
        return spectral.perplexity < h2o.perplexity

    @property
    def verdict(self) -> str:
        """What the numbers say about Spectral and H2O, in one or two sentences."""
        _, h2o, spectral = self.perplexity.runs
        paired = next(
            pair.difference
            for pair in self.perplexity.comparisons
            if FULL not in (pair.policy, pair.baseline)
        )
        # The comparison is h2o - spectral, runs being in that order.
        low, high = -paired.high, -paired.low
        clear = low > 0.0 or high < 0.0
        said = "below" if self.spectral_beats_h2o else "NOT below"
        text = (
            f"Spectral's perplexity ({spectral.perplexity:.2f}) is {said} H2O's "
            f"({h2o.perplexity:.2f}) on this document: {-paired.mean:+.4f} nats a token, "
            f"{paired.confidence:.0%} interval {low:+.4f} to {high:+.4f} over {paired.units} "
            "blocks of its tokens"
        )
        return text + ("." if clear else ", which includes no difference.")

    def to_json(self, environment: dict[str, Any]) -> dict[str, Any]:
        """Return the content of ``report.json``.

        Parameters
        ----------
        environment : dict
            Where it was run; see `spectralkv.evaluation.report.environment`.

        Returns
        -------
        dict
            Plain values. ``kv_bytes`` and ``graph_bytes`` are taken when each cache had seen the
            same `prompt_tokens` tokens; ``tokens_per_s`` is of the decoding that followed.
        """
        result = self.perplexity
        content: dict[str, Any] = {
            "model": result.model,
            "prompt_tokens": result.sequence_lengths[0],
            "budget": self.budget,
            "interval": result.settings.interval,
            "chunk": result.chunk,
            "new_tokens": self.new_tokens,
            "scored_tokens": result.scored_tokens,
            "first_scored": result.first_scored,
            "sample_note": result.sample_note,
        }
        for key, run, text in zip(
            (FULL, H2O, SPECTRAL), result.runs, self.continuations, strict=True
        ):
            sequence = run.sequences[0]
            content[key] = {
                "policy": run.policy,
                "window": run.window,
                "sinks": run.sinks,
                "kv_bytes": sequence.kv_bytes,
                "graph_bytes": sequence.graph_bytes,
                "tokens_per_s": text.tokens_per_s,
                "ppl": run.perplexity,
                "tokens_kept": sequence.tokens_kept,
                "evictions": sequence.evictions,
                "stream_seconds": sequence.seconds,
                "continuation": text.text,
            }
        content["comparisons"] = [asdict(comparison) for comparison in result.comparisons]
        content["spectral_below_h2o"] = self.spectral_beats_h2o
        content["verdict"] = self.verdict
        content["environment"] = environment
        return content


def run_demo(
    loaded: LoadedModel,
    text: str,
    config: DemoConfig | None = None,
    *,
    on_progress: Progress | None = None,
) -> DemoResult:
    """Stream the document through three caches, then let each continue it.

    Parameters
    ----------
    loaded : LoadedModel
        The model and its tokenizer.
    text : str
        The document.
    config : DemoConfig, optional
        What to do; the defaults are what ``spectralkv demo`` shows.
    on_progress : Progress, optional
        Called with (what runs, steps done, steps in all).

    Returns
    -------
    DemoResult
        Perplexity, continuations and the heat map.

    Raises
    ------
    EvaluationError
        The document is too short for the budget.
    """
    config = config if config is not None else DemoConfig()
    model, tokenizer, settings = loaded.model, loaded.tokenizer, config.settings
    tokens = tuple(tokenizer.encode(text))[: config.prompt_tokens]
    if not tokens:
        raise EvaluationError("the document has no tokens")
    budget = config.budget.resolve(len(tokens))
    first = scored_range([len(tokens)], [budget])
    sampling = Sampling(max_new_tokens=config.new_tokens, stop_at_eos=False)
    plan = [
        (name, create_policy(PolicySpec(name=name), None if name == FULL else budget, settings))
        for name in (FULL, H2O, SPECTRAL)
    ]
    spectral = plan[-1][1]
    recorder = EvictionRecorder(window=spectral.protected_window, sinks=spectral.sinks)
    runs, continuations = [], []
    heat: HeatMap | None = None
    for name, policy in plan:
        check = exact_budget_check(name, policy.budget)

        def on_evict(
            event: EvictionEvent,
            name: str = name,
            check: Callable[[EvictionEvent], None] = check,
        ) -> None:
            check(event)
            if name == SPECTRAL:
                recorder(event)

        def reading(done: int, total: int, name: str = name) -> None:
            if on_progress is not None:
                on_progress(f"{name}: reading", done, total)

        def writing(done: int, total: int, name: str = name) -> None:
            if on_progress is not None:
                on_progress(f"{name}: writing", done, total)

        cache = create_cache(model, policy, on_evict=on_evict)
        fed = stream(model, tokens, cache, chunk=config.chunk, on_progress=reading)
        runs.append(policy_run(name, policy, [collect(fed, cache)], first))
        if name == SPECTRAL:  # before the continuation's own tokens are judged
            heat = recorder.heat_map(token_pieces(tokenizer, tokens), policy=name, budget=budget)
        continuations.append(
            continue_text(
                model,
                tokenizer,
                fed.next_logits,
                cache,
                sampling,
                prefill_seconds=fed.seconds,
                on_progress=writing,
            )
        )
    if heat is None:
        raise RuntimeError("the Spectral run is missing")
    return DemoResult(
        perplexity=PerplexityResult(
            model=loaded.name,
            chunk=config.chunk,
            settings=settings,
            first_scored=first,
            scored_tokens=len(tokens) - first,
            sequence_lengths=(len(tokens),),
            runs=tuple(runs),
            comparisons=compare(runs, first),
        ),
        budget=budget,
        continuations=tuple(continuations),
        heat=heat,
        new_tokens=config.new_tokens,
    )


def write_demo(
    result: DemoResult, folder: Path, *, title: str, device: str, dtype: str | None = None
) -> dict[str, Path]:
    """Write ``report.json``, ``ppl.png``, ``heatmap.png`` and ``heatmap.html``.

    Parameters
    ----------
    result : DemoResult
        What `run_demo` returned.
    folder : pathlib.Path
        Where to; made if it is not there.
    title : str
        Name of the document.
    device : str
        The torch device that was used.
    dtype : str, optional
        Type of the model's weights.

    Returns
    -------
    dict of str to pathlib.Path
        The files by what they are.

    Raises
    ------
    EvaluationError
        A file cannot be written.
    """
    report.make_folder(folder)
    files = {
        "report": folder / "report.json",
        "perplexity": folder / "ppl.png",
        "heat map": folder / "heatmap.png",
        "heat map of the text": folder / "heatmap.html",
    }
    report.write_json(files["report"], result.to_json(report.environment(device, dtype)))
    plots.plot_running(result.perplexity, files["perplexity"])
    plots.plot_heat_map(result.heat, files["heat map"], title=title)
    page = report.heat_map_html(result.heat, title=title, model=result.perplexity.model)
    report.write_text(files["heat map of the text"], page)
    return files
