"""The prompts that `spectralkv bench` times: into a full cache, and into one that draws a graph.

A prompt goes into an empty cache by one forward pass, as `spectralkv.hf.generate` feeds it. An
evicting cache draws rows of its graph behind the attention of each layer, and cuts the layer there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation import bench_clock
from spectralkv.evaluation.generation import last_logits_only

if TYPE_CHECKING:
    import torch

    from spectralkv.evaluation.bench import BenchConfig
    from spectralkv.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """Prompts of one length, read into caches of one kind.

    Attributes
    ----------
    context : int
        Tokens of each sequence.
    batch : int
        Sequences.
    prompt_rows : int or None
        How many of the newest tokens get a row of the graph; None: transformers' DynamicCache,
        which has no graph.
    is_default : bool
        Whether `prompt_rows` is what :class:`spectralkv.policies.Spectral` does by default.
    budget : int or None
        Tokens that each KV head keeps at the end; None: all, without a cut.
    prompt_seconds : tuple of float
        Seconds of all sequences together, one entry a measurement; empty where `failure` says why.
    split : dict
        Seconds by part, see :data:`spectralkv.evaluation.bench_clock.PARTS`; empty: it was not
        asked for.
    failure : str
        Why there are no times; "" where there are.
    """

    context: int
    batch: int = 1
    prompt_rows: int | None = None
    is_default: bool = False
    budget: int | None = None
    prompt_seconds: tuple[float, ...] = ()
    split: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def kind(self) -> str:
        """The cache."""
        return "DynamicCache" if self.prompt_rows is None else "Spectral"

    @property
    def seconds(self) -> float:
        """Median of the seconds a prompt."""
        return median(self.prompt_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        values = {"kind": self.kind} | asdict(self)
        return values if self.failure else values | {"seconds": self.seconds}


@dataclass(frozen=True, kw_only=True)
class PromptCost:
    """What a cache adds to a prompt; None where a row that it takes has no times.

    Attributes
    ----------
    over_full : float or None
        Its time over that of the full cache.
    rows_seconds : float or None
        What the same cache without a cut takes longer than the full one: drawing rows.
    cut_seconds : float or None
        What it takes longer than without a cut; None where there is none.
    """

    over_full: float | None
    rows_seconds: float | None
    cut_seconds: float | None


def prompt_cost(row: PromptRow, rows: Sequence[PromptRow]) -> PromptCost:
    """Return what a row's cache adds, by the medians of others among `rows` at the same context."""

    def seconds(prompt_rows: int | None, budget: int | None) -> float | None:
        wanted = (row.context, row.batch, prompt_rows, budget)
        for one in rows:
            if (one.context, one.batch, one.prompt_rows, one.budget) == wanted and not one.failure:
                return one.seconds
        return None

    own = seconds(row.prompt_rows, row.budget)
    full = seconds(None, None)
    uncut = seconds(row.prompt_rows, None)
    return PromptCost(
        over_full=None if own is None or full is None else own / full,
        rows_seconds=(
            None if row.prompt_rows is None or uncut is None or full is None else uncut - full
        ),
        cut_seconds=None if row.budget is None or own is None or uncut is None else own - uncut,
    )


def measure_prompts(model: Any, config: BenchConfig, context: int) -> list[PromptRow]:
    """Time prompts of one length: a full cache, then each `prompt_rows` without and with a cut.

    Caches take turns, so that a device that slows down does so for all of them, and the first turn
    is not counted. A cache that does not fit has a row that says so.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    config : BenchConfig
        What is measured; evicting caches keep `middle_budget`.
    context : int
        Tokens of each sequence.
    """
    import torch

    device = model.device
    bench_clock.free_memory(device)
    # Tokens that are all the same would have keys that tie.
    generator = torch.Generator(device).manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    shape = (config.batch, context)
    ids = torch.randint(vocabulary, shape, device=device, generator=generator)
    caches = _caches(config, context)

    def read_once(row: PromptRow, read: Callable[[int], None]) -> PromptRow:
        seconds = bench_clock.seconds_a_step(read, 1, device)
        return replace(row, prompt_seconds=(*row.prompt_seconds, seconds))

    def split(row: PromptRow, read: Callable[[int], None]) -> PromptRow:
        return replace(row, split=bench_clock.split_of(read, 1, row.seconds, device))

    def tried(
        measure: Callable[..., PromptRow], row: PromptRow, policy: Policy | None
    ) -> PromptRow:
        try:
            return measure(row, _reader(model, ids, policy))
        except Exception as error:
            if not bench_clock.is_out_of_memory(error):
                raise
        bench_clock.free_memory(device)
        return replace(row, prompt_seconds=(), failure="does not fit")

    with torch.no_grad():
        warm = [tried(read_once, row, policy) for row, policy in caches]
        rows = [replace(row, prompt_seconds=()) for row in warm]
        for _ in range(config.repeats):
            for i, (_, policy) in enumerate(caches):
                if not rows[i].failure and sum(rows[i].prompt_seconds) <= config.row_seconds:
                    rows[i] = tried(read_once, rows[i], policy)
        for i, (_, policy) in enumerate(caches):
            if config.split and not rows[i].failure:
                rows[i] = tried(split, rows[i], policy)
    return rows


def _caches(config: BenchConfig, context: int) -> list[tuple[PromptRow, Policy | None]]:
    """Return an empty row for each cache, and its policy; None: the full cache."""
    from spectralkv.policies import Spectral

    full = PromptRow(context=context, batch=config.batch)
    caches: list[tuple[PromptRow, Policy | None]] = [(full, None)]
    cutting = config.policy(context, config.middle_budget)
    default = Spectral.prompt_rows
    # More rows than tokens are one for each.
    for count in sorted({min(n, context) for n in (default, *config.prompt_rows)}):
        row = replace(full, prompt_rows=count, is_default=count == min(default, context))
        for budget in (None, cutting.budget):
            policy = replace(cutting, budget=budget, prompt_rows=count)
            caches.append((replace(row, budget=budget), policy))
    return caches


def _reader(model: Any, ids: torch.Tensor, policy: Policy | None) -> Callable[[int], None]:
    """Return what reads a prompt (B, N) so many times, each time into a new cache.

    The caches live as long as it does: to free one takes time, too.
    """
    from transformers import DynamicCache

    from spectralkv.hf import EvictingCache, cache_argument

    caches: list[Any] = []
    last_only = last_logits_only(model)

    def read(count: int) -> None:
        for _ in range(count):
            if policy is None:
                caches.append(DynamicCache(config=model.config))
            else:
                caches.append(EvictingCache(model.config, policy))
            model(input_ids=ids, **cache_argument(caches[-1]), use_cache=True, **last_only)

    return read
