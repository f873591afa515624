"""Configuration of graphs, walks, evictions and monitors.

Each class mirrors one of ``spectralkv/config.h`` and is checked by the same C++ code when made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from spectralkv import _core

__all__ = [
    "EvictionConfig",
    "GraphConfig",
    "MonitorConfig",
    "Population",
    "Rotary",
    "WalkConfig",
    "apply_preset",
]

EdgeLaw = Literal["uniform", "weighted", "attention"]
GraphScope = Literal["head", "layer"]
Restart = Literal["current", "recent", "novelty"]
VisitCount = Literal["edges", "all"]
Solver = Literal["walk", "exact"]
Preset = Literal["default", "walks", "uniform32", "weighted4"]


def _member(enum: Any, name: str, what: str) -> Any:
    members = [member for member in dir(enum) if not member.startswith("_")]
    if name not in members:
        choices = ", ".join(repr(member) for member in sorted(members))
        raise _core.InvalidArgument(f"[config] {what} must be one of {choices}, got {name!r}")
    return getattr(enum, name)


def _parse_device(device: str) -> _core.Device:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise _core.InvalidArgument(
            f"[config] device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}"
        )
    return _core.Device(_member(_core.DeviceType, kind, "device"), int(index or 0))


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How a model turned its keys by their positions, so that novelty can compare them unturned.

    Parameters
    ----------
    inv_freq
        Radians a token by which each pair of elements is turned. Elements behind the last pair
        were not turned.
    interleaved
        Pair i is elements ``2 i`` and ``2 i + 1``; otherwise ``i`` and ``i + len(inv_freq)``.
    """

    inv_freq: tuple[float, ...] = ()
    interleaved: bool = False

    def _to_core(self) -> _core.Rotary:
        core = _core.Rotary()
        core.inv_freq = list(self.inv_freq)
        core.interleaved = self.interleaved
        return core


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Shape and memory of the graphs of one model.

    A graph is one (layer, sequence, KV head), or one (layer, sequence) with ``scope="layer"``.

    Parameters
    ----------
    num_layers, batch_size, num_query_heads, num_kv_heads, head_dim
        Shape of the model; ``num_query_heads`` is a multiple of ``num_kv_heads``.
    capacity
        Slots a graph.
    top_k
        Neighbours a token: 4, 8, 16 or 32.
    edge_law
        ``"uniform"``: each neighbour is followed alike; ``"weighted"``: by its part of the
        attention to all neighbours; ``"attention"``: by its attention, and what the neighbours
        leave over, to sinks for instance, is a restart.
    pack_rows
        Rows of 16-bit slots and 16-bit cumulative probabilities where a graph has at most 65,535
        slots: half the memory. Otherwise, and in larger graphs, both have 32 bits;
        ``edge_law="uniform"`` has no probabilities to pack.
    scope
        ``"head"``: a graph for each KV head; ``"layer"``: the heads of a layer share one.
    num_sinks
        Tokens at positions below this get no edges and no restarts.
    seed
        Of all random numbers.
    head_offset, total_kv_heads
        For tensor parallelism: the first KV head here, and KV heads over all ranks (0:
        ``num_kv_heads``).
    device
        ``"cpu"``, ``"cuda"`` (the first one) or ``"cuda:N"``.
    num_threads
        Of the CPU backend; 0: one for each processor the process may run on.
    eager_checks
        CUDA: wait for the device to check slots and kept lists, so that a call with bad ones raises
        and changes nothing. Otherwise no call waits: faulty ones stop all later changes, and the
        calls after the device found it raise until ``reset()`` of all layers.
    rotary
        How keys were turned; without frequencies, novelty compares them as they lie.

    Raises
    ------
    InvalidArgument
        A ``ValueError`` that names the field, what was expected and what came.
    """

    num_layers: int = 1
    batch_size: int = 1
    num_query_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 64
    capacity: int = 0
    top_k: int = 8
    edge_law: EdgeLaw = "weighted"
    pack_rows: bool = True
    scope: GraphScope = "head"
    num_sinks: int = 4
    seed: int = 0
    head_offset: int = 0
    total_kv_heads: int = 0
    device: str = "cpu"
    num_threads: int = 0
    eager_checks: bool = False
    rotary: Rotary = field(default_factory=Rotary)

    def __post_init__(self) -> None:
        self._to_core().validate()

    def _to_core(self) -> _core.GraphConfig:
        core = _core.GraphConfig()
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "edge_law":
                value = _member(_core.EdgeLaw, value, "edge_law")
            elif entry.name == "scope":
                value = _member(_core.GraphScope, value, "scope")
            elif entry.name == "device":
                value = _parse_device(value)
            elif entry.name == "rotary":
                value = value._to_core()
            setattr(core, entry.name, value)
        return core


@dataclass(frozen=True, kw_only=True)
class Population:
    """A part of the walkers that restarts and counts in one way, and its part of the budget.

    Parameters
    ----------
    restart
        ``"current"``: the newest token; ``"recent"``: one of the newest; ``"novelty"``: by softmax
        of the z-scored distance of a key from the mean key direction of its head.
    count
        ``"edges"``: visits are arrivals over an edge; ``"all"``: restarts count, too.
    share
        Of walkers and budget, in (0, 1]; the shares of a walk sum to 1.
    recent_fraction, recent_tokens
        How many tokens are recent: this part of the tokens seen or, when positive, this many.
    decay
        Of this population's scores, in [0, 1]; None: that of the walk.
    solver
        ``"walk"``: by random walks; ``"exact"``: by one sweep, what infinitely many walkers would
        find, in units of the visits of its share. The other populations walk as they would beside
        walkers.
    """

    restart: Restart = "recent"
    count: VisitCount = "edges"
    share: float = 1.0
    recent_fraction: float = 0.1
    recent_tokens: int = 0
    decay: float | None = None
    solver: Solver = "walk"

    def __post_init__(self) -> None:
        self._to_core()

    def _to_core(self) -> _core.Population:
        core = _core.Population()
        core.restart = _member(_core.Restart, self.restart, "restart")
        core.count = _member(_core.VisitCount, self.count, "count")
        core.share = self.share
        core.recent_fraction = self.recent_fraction
        core.recent_tokens = self.recent_tokens
        core.decay = self.decay
        core.solver = _member(_core.Solver, self.solver, "a population's solver")
        return core

    @classmethod
    def _from_core(cls, core: _core.Population) -> Population:
        return cls(
            restart=cast("Restart", core.restart.name),
            count=cast("VisitCount", core.count.name),
            share=core.share,
            recent_fraction=core.recent_fraction,
            recent_tokens=core.recent_tokens,
            decay=core.decay,
            solver=cast("Solver", core.solver.name),
        )


def _default_populations() -> tuple[Population, ...]:
    return tuple(Population._from_core(core) for core in _core.WalkConfig().populations)


@dataclass(frozen=True, kw_only=True)
class WalkConfig:
    """Personalized PageRank, by random walks or exactly.

    Parameters
    ----------
    num_walkers
        A graph, over all populations. Those of a population that is solved exactly do not start:
        they are the unit of its scores, so where one is, each population needs one at least.
    walk_length
        Steps a walker.
    restart_prob
        In (0, 1]: probability of a restart at each step, 1 - damping in PageRank's words.
    decay
        ``scores = decay * scores + visits`` at each walk, in [0, 1]; of populations that have none
        of their own.
    novelty_width
        A novelty population restarts at a token by the mean weight of the tokens held among so
        many positions around it: an odd number, 1 to 1,023.
    populations
        One to four, see :class:`Population`.

    Raises
    ------
    InvalidArgument
        A ``ValueError`` that names the field, what was expected and what came.
    """

    num_walkers: int = 1024
    walk_length: int = 20
    restart_prob: float = 0.7
    decay: float = 0.0
    novelty_width: int = 5
    populations: tuple[Population, ...] = field(default_factory=_default_populations)

    def __post_init__(self) -> None:
        object.__setattr__(self, "populations", tuple(self.populations))
        self._to_core().validate()

    def _to_core(self) -> _core.WalkConfig:
        core = _core.WalkConfig()
        core.num_walkers = self.num_walkers
        core.walk_length = self.walk_length
        core.restart_prob = self.restart_prob
        core.decay = self.decay
        core.novelty_width = self.novelty_width
        core.populations = [population._to_core() for population in self.populations]
        return core

    @property
    def needs_novelty(self) -> bool:
        """Whether a population restarts from novel keys, for which walks need the keys."""
        return any(population.restart == "novelty" for population in self.populations)


@dataclass(frozen=True, kw_only=True)
class EvictionConfig:
    """When a sequence's cache is cut, and what always stays.

    Parameters
    ----------
    budget
        Tokens kept a head, sinks and window included; at least ``sinks + window + 1``.
    interval
        A sequence is cut when a head holds so many tokens more than its budget.
    window, sinks
        Newest and oldest tokens that always stay.
    head_budgets
        Tokens that each KV head of a layer keeps, in place of ``budget``: heads that keep more or
        less than others. Empty: all keep ``budget``.

    Raises
    ------
    InvalidArgument
        A ``ValueError`` that names the field, what was expected and what came.
    """

    budget: int
    interval: int = 32
    window: int = 50
    sinks: int = 4
    head_budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_budgets", tuple(self.head_budgets))
        self._to_core().validate()

    def _to_core(self) -> _core.EvictionConfig:
        core = _core.EvictionConfig()
        core.budget = self.budget
        core.interval = self.interval
        core.window = self.window
        core.sinks = self.sinks
        core.head_budgets = list(self.head_budgets)
        return core


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Settings of a :class:`spectralkv.Monitor`.

    Parameters
    ----------
    eviction
        See :class:`EvictionConfig`.
    solver
        ``"walk"``: each population as it says; ``"exact"``: all by one noiseless sweep.
    walk_interval
        A sequence's importance is renewed when its prompt ends, before it is cut and, where this is
        positive, every so many tokens.
    top_fraction
        The part of a head's tokens that the safety mask protects, in [0, 1].
    row_stride
        Every how many prompt tokens a row of the graph is drawn.
    prompt_rows
        Most rows of a chunk of prompt: of its newest columns. The tokens before them have no edges.
    head_budgets
        ``EvictionConfig.head_budgets`` of each layer, (L, Hkv). Empty: those of ``eviction``.

    Raises
    ------
    InvalidArgument
        A ``ValueError`` that names the field, what was expected and what came.
    """

    eviction: EvictionConfig
    solver: Solver = "walk"
    walk_interval: int = 0
    top_fraction: float = 0.2
    row_stride: int = 1
    prompt_rows: int = 1024
    head_budgets: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_budgets", tuple(map(tuple, self.head_budgets)))
        self._to_core().validate()

    def eviction_of(self, layer: int) -> EvictionConfig:
        """Return how a layer is cut."""
        if not self.head_budgets:
            return self.eviction
        return dataclasses.replace(self.eviction, head_budgets=self.head_budgets[layer])

    def _to_core(self) -> _core.MonitorConfig:
        core = _core.MonitorConfig()
        core.eviction = self.eviction._to_core()
        core.solver = _member(_core.Solver, self.solver, "solver")
        core.walk_interval = self.walk_interval
        core.top_fraction = self.top_fraction
        core.row_stride = self.row_stride
        core.prompt_rows = self.prompt_rows
        core.head_budgets = [list(budgets) for budgets in self.head_budgets]
        return core


def apply_preset(
    name: Preset | str, graph: GraphConfig, walk: WalkConfig | None = None
) -> tuple[GraphConfig, WalkConfig]:
    """Set edge law, top_k and the walk to a named choice.

    Parameters
    ----------
    name
        ``"default"``; ``"walks"``: the default with nothing solved exactly; ``"uniform32"`` or
        ``"weighted4"``.
    graph, walk
        Configurations to start from; what the preset does not name stays.

    Returns
    -------
    tuple of GraphConfig and WalkConfig

    Raises
    ------
    InvalidArgument
        The name is not a preset's.
    """
    core_graph = graph._to_core()
    core_walk = (walk or WalkConfig())._to_core()
    _core.apply_preset(name, core_graph, core_walk)
    return (
        dataclasses.replace(
            graph, top_k=core_graph.top_k, edge_law=cast("EdgeLaw", core_graph.edge_law.name)
        ),
        WalkConfig(
            num_walkers=core_walk.num_walkers,
            walk_length=core_walk.walk_length,
            restart_prob=core_walk.restart_prob,
            decay=core_walk.decay,
            novelty_width=core_walk.novelty_width,
            populations=tuple(Population._from_core(p) for p in core_walk.populations),
        ),
    )
