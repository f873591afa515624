"""The oracle's graphs: one layer's captured attention, and what each method keeps of it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spectralkv import GraphManager, Rotary
    from spectralkv.evaluation.oracle import OracleConfig

PAGERANK, H2O, CLAIRVOYANT = "pagerank", "h2o", "clairvoyant"
WALK, DENSE = "pagerank walk", "pagerank dense"
#: H2O with the window and the sinks of PageRank instead of its own.
H2O_SHARED = "h2o, shared window"
RECENT = "streaming_llm"
#: What is tried in all layers at once, and in one layer alone.
METHODS = (PAGERANK, WALK, DENSE, H2O, H2O_SHARED, RECENT, CLAIRVOYANT)
LAYER_METHODS = (PAGERANK, H2O, H2O_SHARED, CLAIRVOYANT)

# Elements of attention that are ranked at a time.
_BLOCK_ELEMENTS = 1 << 24
# networkx stops when an entry changes by less than this on average; a millionth of a visit's share.
_TOLERANCE = 1e-13
# A row that lacks less than this to 1 lacks nothing.
_ROUNDING = 1e-6
# What is left of an entry that is 0 in the limit.
_NOISE = 1e-11


class LayerGraph:
    """The attention graph of one layer over the context, and what each method keeps of it.

    Parameters
    ----------
    attention : torch.Tensor
        float16 (Hkv, T, T), T >= N, as `Capture.layer` returns it.
    keys : torch.Tensor
        (1, Hkv, N, D): the keys of the context.
    config : OracleConfig
        Preset, budget, window, sinks, seed.
    layer : int
        Place of the layer among those that can evict; layers walk with numbers of their own.
    rotary : Rotary or None
        How the model turned the keys, as the Spectral policy is told.
    """

    def __init__(
        self,
        attention: Any,
        keys: Any,
        config: OracleConfig,
        *,
        layer: int,
        rotary: Rotary | None = None,
    ) -> None:
        from dataclasses import replace

        import torch

        import spectralkv
        from spectralkv.config import apply_preset

        if keys.device.type == "cuda" and spectralkv.cuda_device_count() == 0:
            keys, attention = keys.cpu(), attention.cpu()  # the package was built without CUDA
        if keys.dtype == torch.float64:
            keys = keys.float()
        heads, size = keys.shape[1:3]
        self._config = config
        self._attention = attention[:, :size, :size]
        self._later = attention[:, size:, :size]
        graph, walk = apply_preset(
            config.preset,
            spectralkv.GraphConfig(
                num_layers=layer + 1,  # the number of a layer is part of its random numbers
                num_query_heads=heads,
                num_kv_heads=heads,
                head_dim=keys.shape[3],
                num_sinks=config.sinks,
                seed=config.seed,
                device=str(keys.device),
                rotary=rotary or spectralkv.Rotary(),
            ),
        )
        if config.edge_law is not None:
            graph = replace(graph, edge_law=config.edge_law)
        # What the solver found must not decay into the walk's scores, which are to be walks'.
        populations = tuple(replace(each, decay=None, solver="walk") for each in walk.populations)
        self._walk = replace(walk, decay=0.0, populations=populations)
        self._manager: GraphManager = spectralkv.GraphManager(graph, self._walk)
        self._is_share = graph.edge_law != "attention"
        self._layer, self._like = layer, keys
        neighbors, probabilities = draw_rows(
            self._attention, graph.top_k, config.sinks, as_share=self._is_share
        )
        positions = torch.arange(size, dtype=torch.int32, device=keys.device)
        self._manager.reserve(layer, size)
        self._manager.load_rows(
            layer,
            positions.expand(1, heads, -1).contiguous(),
            neighbors[None],
            probabilities[None],
        )
        if self._walk.needs_novelty:
            self._manager.update_novelty(layer, keys)
        self._manager.solve(layer)
        self._exact = torch.stack([self._scores(p) for p in range(len(self._walk.populations))])
        self._kept: dict[str, Any] = {}

    def choices(self) -> dict[str, Any]:
        """Return what each of `METHODS` keeps: int64 (Hkv, budget), ascending positions.

        Renews the library's scores by a walk.
        """
        import torch

        from spectralkv import policies
        from spectralkv.policies.base import select_slots

        config, heads = self._config, self._attention.shape[0]
        size = self._attention.shape[1]

        def best(scores: Any, *, window: int, sinks: int) -> Any:
            kept = select_slots(
                scores[None], (size,), (True,), budget=config.kept, window=window, sinks=sinks
            )
            return kept[0].long()

        kept = self._kept
        kept[PAGERANK] = self._select()
        kept[DENSE] = select_by_shares(
            self._dense_scores(), self._shares, config.kept, config.window, config.sinks
        )
        self._manager.walk(self._layer)
        kept[WALK] = self._select()
        drawn = self._attention.sum(1, dtype=torch.float32)
        published = policies.H2O(budget=config.kept)
        kept[H2O] = best(drawn, window=published.protected_window, sinks=published.sinks)
        kept[H2O_SHARED] = best(drawn, window=config.window, sinks=config.sinks)
        age = torch.arange(size, dtype=torch.float32, device=drawn.device).expand(heads, -1)
        kept[RECENT] = best(age, window=0, sinks=config.sinks)
        kept[CLAIRVOYANT] = best(self._later.sum(1, dtype=torch.float32), window=0, sinks=0)
        return dict(kept)

    def overlaps(self) -> dict[str, float]:
        """Return which share of the exact solver's choice the others make, too.

        Sinks and window, which all of them keep, do not count.
        """
        import torch

        free = self._config.kept - self._config.window - self._config.sinks
        size = self._attention.shape[1]

        def mask(name: str) -> Any:
            chosen = self._kept[name]
            held = torch.zeros(chosen.shape[0], size, dtype=torch.bool, device=chosen.device)
            held.scatter_(1, chosen, True)
            held[:, : self._config.sinks] = held[:, size - self._config.window :] = False
            return held

        exact = mask(PAGERANK)
        counts = {name: float((exact & mask(name)).sum()) for name in (WALK, DENSE)}
        whole = exact.shape[0] * free
        return {"walk": counts[WALK] / whole, "dense": counts[DENSE] / whole}

    def agreement(self, head: int, *, dense: bool) -> dict[str, float | None]:
        """Rank a head's tokens by networkx, and compare.

        Parameters
        ----------
        head : int
            Which KV head.
        dense : bool
            Also on all edges.

        Returns
        -------
        dict
            ``spearman``, ``spearman_dense`` and ``seconds``, see the module.
        """
        import numpy as np

        start = time.perf_counter()
        neighbors, probabilities = self._manager.rows(self._layer, like=self._like)
        size = self._attention.shape[1]
        rows = np.zeros((size, size))
        to, weight = neighbors[0, head].cpu().numpy(), probabilities[0, head].cpu().numpy()
        at, edge = np.nonzero(weight)
        rows[at, to[at, edge]] = weight[at, edge]
        graphs = [(rows, self._exact)]
        if dense:
            full = self._dense_rows(head).double().cpu().numpy()
            graphs.append((full, self._dense_scores()))
        found: list[float | None] = []
        for matrix, scores in graphs:
            worst = 1.0
            for number, population in enumerate(self._walk.populations):
                restart = self._restart(number)[head].double().cpu().numpy()
                expected = networkx_scores(
                    matrix,
                    restart,
                    restart_prob=self._walk.restart_prob,
                    only_edges=population.count == "edges",
                )
                ours = scores[number, head].double().cpu().numpy()
                worst = min(worst, rank_correlation(expected, ours))
            found.append(worst)
        return {
            "spearman": found[0],
            "spearman_dense": found[1] if dense else None,
            "seconds": time.perf_counter() - start,
        }

    @property
    def _shares(self) -> list[float]:
        return [population.share for population in self._walk.populations]

    def _select(self) -> Any:
        import spectralkv

        config = self._config
        eviction = spectralkv.EvictionConfig(
            budget=config.kept, interval=1, window=config.window, sinks=config.sinks
        )
        kept = self._manager.select(self._layer, eviction, like=self._like, force=True)
        return kept[0].long()

    def _scores(self, population: int) -> Any:
        scores = self._manager.scores(self._layer, like=self._like, population=population)
        return scores[0].clone()

    def _restart(self, population: int) -> Any:
        return self._manager.restart_distribution(self._layer, population, like=self._like)[0]

    def _dense_rows(self, head: int) -> Any:
        """Return float32 (N, N): where a token's walk goes on, over all edges."""
        rows = self._attention[head].float().tril(-1)
        rows[:, : self._config.sinks] = 0.0
        return _rows_of(rows, as_share=self._is_share)

    def _dense_scores(self) -> Any:
        """Return float32 (P, Hkv, N): PageRank over all edges.

        Edges lead to older tokens only, so y = r + (1 - p) A' y is one triangular system.
        """
        import torch

        if not hasattr(self, "_dense"):
            populations = self._walk.populations
            restarts = torch.stack([self._restart(p) for p in range(len(populations))], 2)
            results = []
            for head in range(self._attention.shape[0]):
                system = self._dense_rows(head).T.mul(self._walk.restart_prob - 1.0)
                system.fill_diagonal_(1.0)
                solution = torch.linalg.solve_triangular(system, restarts[head], upper=True)
                visits = solution.clone()
                for number, population in enumerate(populations):
                    if population.count == "edges":
                        visits[:, number] -= restarts[head][:, number]
                results.append((visits / solution.sum(0)).T)
            self._dense = torch.stack(results, 1)
        return self._dense


def draw_rows(attention: Any, top_k: int, sinks: int, *, as_share: bool = True) -> tuple[Any, Any]:
    """Draw every token's edges from captured attention, as the library draws them.

    Parameters
    ----------
    attention : torch.Tensor
        float16 (H, N, N): row t is what token t paid, 0 above the diagonal. N at most 65,536.
    top_k : int
        Most edges of a token.
    sinks : int
        Oldest tokens, to which no edge leads.
    as_share : bool
        Probabilities are shares of the row's edges and sum to 1. False: they are the attention
        itself, as the edge law ``"attention"`` has it.

    Returns
    -------
    neighbors : torch.Tensor
        int32 (H, N, top_k): the tokens that were paid most, -1 where there are fewer. Of equal
        attention the older token comes first.
    probabilities : torch.Tensor
        float32 (H, N, top_k): of each edge.
    """
    import torch

    heads, size, _ = attention.shape
    device = attention.device
    neighbors = torch.full((heads, size, top_k), -1, dtype=torch.int32, device=device)
    weights = torch.zeros((heads, size, top_k), dtype=torch.float32, device=device)
    column = torch.arange(size, dtype=torch.int32, device=device)
    count = min(top_k, size)
    step = max(1, _BLOCK_ELEMENTS // (heads * size))
    for start in range(0, size, step):
        rows = attention[:, start : start + step]
        rows = rows.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
        is_open = (column >= sinks) & (column < column[start : start + step, None])
        rows = rows.masked_fill(~is_open, 0.0)
        # Positive float16 numbers are ordered as their bits are, which leaves 16 bits to rank equal
        # ones by age: no two entries are alike, and every device picks the same.
        ranked = (rows.view(torch.int16).int() << 16) | (0xFFFF - column)
        best = ranked.topk(count, dim=-1).values
        found = best >> 16 > 0
        to = (0xFFFF - (best & 0xFFFF)).int()
        neighbors[:, start : start + step, :count] = to.masked_fill(~found, -1)
        picked = rows.gather(2, to.long()).float()
        weights[:, start : start + step, :count] = picked.masked_fill(~found, 0.0)
    return neighbors, _rows_of(weights, as_share=as_share)


def _rows_of(weights: Any, *, as_share: bool) -> Any:
    """Return attention as probabilities; what was rounded to half may sum to a bit more than 1."""
    total = weights.sum(-1, keepdim=True)
    return weights / (total.masked_fill(total == 0, 1.0) if as_share else total.clamp_min(1.0))


def select_by_shares(
    scores: Any, shares: Sequence[float], budget: int, window: int, sinks: int
) -> Any:
    """Choose tokens population by population, as `spectralkv.GraphManager.select` does.

    Parameters
    ----------
    scores : torch.Tensor
        float (P, H, N).
    shares : sequence of float
        Each population's part of the places, P of them.
    budget, window, sinks : int
        Tokens that stay; of them the newest and the oldest.

    Returns
    -------
    torch.Tensor
        int64 (H, budget), ascending. Of equal scores the newer token stays.
    """
    import torch

    heads, size = scores.shape[1:]
    taken = torch.zeros(heads, size, dtype=torch.bool, device=scores.device)
    taken[:, :sinks] = taken[:, size - window :] = True
    places = budget - window - sinks
    quotas = [math.floor(share * places + 1e-9) for share in shares]
    quotas[0] += places - sum(quotas)
    for quota, ranked in zip(quotas, scores, strict=True):
        order = ranked.masked_fill(taken, float("-inf")).sort(dim=-1, stable=True).indices
        taken.scatter_(1, order[:, size - quota :], True)
    return taken.nonzero()[:, 1].view(heads, budget)


def networkx_scores(rows: Any, restart: Any, *, restart_prob: float, only_edges: bool) -> Any:
    """Personalized PageRank of a graph by networkx.

    Parameters
    ----------
    rows : numpy.ndarray
        float64 (N, N): probability of the edge from a row's token to a column's. What a row lacks
        to 1 is a restart.
    restart : numpy.ndarray
        float64 (N,): where the walk restarts.
    restart_prob : float
        1 - damping.
    only_edges : bool
        Count arrivals over edges alone: (1 - p) P' pi instead of pi.

    Returns
    -------
    numpy.ndarray
        float64 (N,).

    Raises
    ------
    MissingDependencyError
        networkx or scipy is not installed.
    """
    import numpy as np

    nx = require_networkx()
    size = len(rows)
    # What a row leaves over restarts. networkx takes rows as shares, so that part leads to a node
    # of its own without edges, from which the walk restarts; ranks among the tokens are the same.
    left = 1.0 - rows.sum(axis=1)
    matrix = np.zeros((size + 1, size + 1))
    matrix[:size, :size] = rows
    matrix[:size, size] = np.where(left > _ROUNDING, left, 0.0)
    graph = nx.from_numpy_array(matrix, create_using=nx.DiGraph)
    places = {**dict(enumerate(restart)), size: 0.0}
    ranks = nx.pagerank(
        graph,
        alpha=1.0 - restart_prob,
        personalization=places,
        dangling=places,
        tol=_TOLERANCE,
        max_iter=10_000,
    )
    visits = np.array([ranks[node] for node in range(size)])
    visits /= visits.sum()
    return (1.0 - restart_prob) * (visits @ rows) if only_edges else visits


def rank_correlation(a: Any, b: Any) -> float:
    """Return Spearman's rank correlation of two vectors of scores (N,), each summing to its share.

    What an iteration leaves of a zero is no rank: entries below 1e-11 of the sum count as 0. Two
    constant vectors agree.
    """
    import numpy as np

    try:
        from scipy.stats import spearmanr
    except ModuleNotFoundError:
        raise _missing("scipy") from None
    ours = [np.where(x < _NOISE * max(x.sum(), _NOISE), 0.0, x) for x in (a, b)]
    constant = [np.ptp(x) == 0 for x in ours]
    if any(constant):
        return 1.0 if all(constant) else 0.0
    return float(spearmanr(*ours).statistic)


def require_networkx() -> Any:
    """Return networkx.

    Raises
    ------
    MissingDependencyError
        It, or scipy, with which it computes, is not installed.
    """
    try:
        import networkx as nx
        import scipy  # noqa: F401 - networkx.pagerank computes with it
    except ModuleNotFoundError as error:
        raise _missing(str(error.name)) from None
    return nx


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"{package} is not installed: pip install 'spectralkv[evaluate]'")
