"""Spectral: the tokens that walks over the attention graph reach, random or solved exactly."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch

from spectralkv._core import CudaError
from spectralkv.config import (
    EvictionConfig,
    GraphConfig,
    Population,
    Rotary,
    WalkConfig,
    apply_preset,
)
from spectralkv.monitor import Monitor
from spectralkv.policies.base import (
    AttendingTracker,
    DecodeStep,
    Observation,
    Policy,
    Tracker,
    host_numbers,
)
from spectralkv.policies.head_shares import (
    HeadBudgets,
    HeadShares,
    budgets_of,
    check_head_shares,
    places_won,
)

_T = TypeVar("_T")

# Of the core's attention, whose sums lie in shared memory.
_MOST_CUDA_DIM = 256
_MOST_CUDA_SUMS = 16 * 256
# Slots are int32.
_MOST_SLOTS = (1 << 31) - 1
# How much a text grows, as a factor, until heads compete anew.
_GROWTH = 1.25
# Times the slots a layer needs that its graph may hold on CUDA before memory is given back.
_SPARE = 4


@dataclass(frozen=True, kw_only=True)
class Spectral(Policy):
    r"""Keep the tokens with the highest personalized PageRank.

    Each token points to the `top_k` tokens it attended to most. Walkers restart at a population's
    tokens with `restart_prob` and else follow an edge; the more often they arrive at a token, the
    longer it stays. By default six tenths of the budget go to what walks from recent tokens reach,
    four to what is reached from phrases with distinctive keys, which is solved exactly, so that no
    noise parts a phrase.

    .. math:: \pi = p \, s + (1 - p) \, P^{\top} \pi

    with P the rows of the graph, s the restart distribution and p = `restart_prob` (damping is
    1 - p).

    Parameters
    ----------
    preset : {"default", "walks", "uniform32", "weighted4"}
        Edge law, `top_k` and walks by name; the options below override it where they are not None.
    edge_law : {"uniform", "weighted", "attention"} or None
        How neighbours are followed: alike, by their part of the attention to all neighbours, or by
        their attention, with a restart for what goes to other tokens.
    top_k : int or None
        Neighbours of a token: 4, 8, 16 or 32.
    restart_prob : float or None
        Probability of a restart at each step, in (0, 1].
    num_walkers, walk_length : int or None
        Walkers of a graph and steps of a walker.
    decay : float or None
        Factor of the former scores at each walk. 0: each walk anew, 1: never forget. A population's
        own comes first.
    novelty_width : int or None
        Tokens of a phrase: a novelty population restarts at a token by the mean weight of the
        tokens held among so many positions around it; an odd number, 1: each for itself.
    populations : tuple of Population or None
        Where walkers restart, what counts, how fast it is forgotten, the share of walkers and
        budget, and whether scores are found by walking or exactly.
    pack_rows : bool
        Rows of 16-bit slots and 16-bit cumulative probabilities where a graph has at most 65,535
        slots: half the memory. False: 32 bits each.
    scope : {"head", "layer"}
        Whether each KV head has a graph or a layer's heads share one.
    solver : {"walk", "exact"}
        Random walks, but for populations that say otherwise, as novelty does by default; or for
        all populations one deterministic sweep: what infinitely many walks would find. On a CPU it
        is faster while a head holds some thousand tokens. Text alone is kept better where novelty
        walks, too (preset "walks"): noise lets heads keep different tokens.
    walk_interval : int
        Scores are renewed every `walk_interval` decoded tokens; 0: only at a cut.
    row_stride : int
        Every how many tokens of a chunk one gets a row of the graph; the others have no edges.
    prompt_rows : int
        Most rows of a chunk, those of its newest tokens; the others have no edges. It bounds what a
        long prompt in one chunk costs.
    scan_interval : int
        Every how many decode steps, forward passes of one new token, a layer gives its token a row,
        for which all its keys are read; tokens between have no edges. Layers take turns, so that
        each step reads about as many. For caches whose attention is the model's, to which it leaves
        the attention everywhere: where Spectral attends itself, each row comes with the attention,
        and above 1 saves nothing.
    unrotate : bool
        Whether novelty compares keys as they were before the model turned them by their positions:
        distinctive for what they say, not for where. Without effect where the model does not turn
        them, or in a way that is not known.
    head_shares : tuple of tuple of float, "visits" or None
        Which part of an even budget each head gets. (L, Hkv), of each evicting layer, 1 on average:
        what each model's heads need ``spectralkv calibrate`` finds. "visits": the heads of a layer
        compete for the places of the first population, whose tokens are visited most gets them; at
        the first cut, and anew whenever the text has grown by a quarter; of a batch the mean of its
        long sequences counts. None: all get the same.
        With shares the policy attends at decode steps on a CPU, too, and sequences of a batch are
        cut together.
    head_floor : float
        With ``head_shares="visits"``: the part of its even places that each head has for sure, in
        [0, 1].
    seed : int
        Seed of the walks.

    Notes
    -----
    All layers of a cache on one device share one :class:`spectralkv.Monitor`, which computes on
    that device. On CUDA nothing waits for it while sequences without padding are decoded. The
    place in a batch is no part of the random numbers: a sequence walks in a batch as it would
    alone.

    References
    ----------
    Page et al., "The PageRank Citation Ranking: Bringing Order to the Web", 1999.
    Fogaras et al., "Towards Scaling Fully Personalized PageRank", 2005.
    """

    name: ClassVar[str] = "spectral"

    preset: Literal["default", "walks", "uniform32", "weighted4"] = "default"
    edge_law: Literal["uniform", "weighted", "attention"] | None = None
    top_k: int | None = None
    restart_prob: float | None = None
    num_walkers: int | None = None
    walk_length: int | None = None
    decay: float | None = None
    novelty_width: int | None = None
    populations: tuple[Population, ...] | None = None
    pack_rows: bool = True
    scope: Literal["head", "layer"] = "head"
    solver: Literal["walk", "exact"] = "walk"
    walk_interval: int = 0
    row_stride: int = 1
    prompt_rows: int = 1024
    scan_interval: int = 1
    unrotate: bool = True
    head_shares: HeadShares | Literal["visits"] | None = None
    head_floor: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_int("walk_interval", minimum=0)
        self._require_int("row_stride", minimum=1)
        self._require_int("prompt_rows", minimum=1)
        self._require_int("scan_interval", minimum=1)
        self._require_int("seed", minimum=0)
        self._require(isinstance(self.unrotate, bool), "unrotate", "True or False")
        self._require(isinstance(self.pack_rows, bool), "pack_rows", "True or False")
        self._require(self.solver in ("walk", "exact"), "solver", "'walk' or 'exact'")
        self._require(0.0 <= self.head_floor <= 1.0, "head_floor", "from 0 to 1")
        if self.head_shares is not None:
            if self.head_shares != "visits":
                wrong = check_head_shares(self.head_shares)
                self._require(wrong is None, "head_shares", wrong or "")
            self._require(self.scope == "head", "scope", "'head' with head_shares")
            self._require(self.scan_interval == 1, "scan_interval", "1 with head_shares")
        # The core checks what it is given; a policy with a bad option must not come to be.
        walk = self.walk_config
        self._eviction()
        self._require(
            self.scan_interval == 1
            or all(population.restart != "current" for population in walk.populations),
            "scan_interval",
            "1 with a population that restarts at the current token, whose row it needs",
        )
        self._require(
            not self._competes or walk.populations[0].restart != "novelty",
            "head_shares",
            "shares, or None, where the first population restarts at novel tokens",
        )

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers; they share one monitor."""
        shares = self.head_shares
        if shares is not None and not self._competes and len(shares) != num_layers:
            raise ValueError(
                f"[{self.name}] head_shares must be those of {num_layers} layers that evict, got "
                f"{len(shares)}"
            )
        monitors = _Monitors(self, num_layers)
        rooms: list[tuple[int, ...] | None] = [None] * num_layers
        if self.head_budgets:
            rooms = [
                tuple(kept + self.cut_interval for kept in budgets) for budgets in self.head_budgets
            ]
        return [
            _SpectralTracker(self, layer, monitors, rooms[layer]) for layer in range(num_layers)
        ]

    @property
    def walk_config(self) -> WalkConfig:
        """How walks go: the preset with what the options override."""
        return self._graph_and_walk(GraphConfig())[1]

    def _graph_and_walk(self, graph: GraphConfig) -> tuple[GraphConfig, WalkConfig]:
        graph, walk = apply_preset(self.preset, graph)
        if self.top_k is not None:
            graph = replace(graph, top_k=self.top_k)
        if self.edge_law is not None:
            graph = replace(graph, edge_law=self.edge_law)
        graph = replace(
            graph,
            pack_rows=self.pack_rows,
            scope=self.scope,
            num_sinks=self.sinks,
            seed=self.seed,
        )
        options: dict[str, Any] = {
            "restart_prob": self.restart_prob,
            "num_walkers": self.num_walkers,
            "walk_length": self.walk_length,
            "decay": self.decay,
            "novelty_width": self.novelty_width,
            "populations": self.populations,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return graph, replace(walk, **given)

    @property
    def head_budgets(self) -> HeadBudgets:
        """Tokens that each head keeps, (L, Hkv); empty: all the same, or what visits say."""
        if self.head_shares is None or self.head_shares == "visits" or self.budget is None:
            return ()
        return budgets_of(self.head_shares, self.budget, self.sinks + self.window + 1)

    @property
    def places_to_compete_for(self) -> int:
        """Places of the first population in a head: what the others' shares leave; at least 1.

        Raises
        ------
        ValueError
            There is no budget.
        """
        self._require(self.budget is not None, "budget", "a number of tokens, to compete for")
        free = (self.budget or 0) - self.sinks - self.window
        others = self.walk_config.populations[1:]
        return free - sum(int(population.share * free + 1e-9) for population in others)

    @property
    def _competes(self) -> bool:
        """Whether heads get the places that their visits win."""
        return self.head_shares == "visits"

    def _eviction(self) -> EvictionConfig:
        never = _MOST_SLOTS - self.cut_interval
        return EvictionConfig(
            budget=never if self.budget is None else self.budget,
            interval=self.cut_interval,
            window=self.window,
            sinks=self.sinks,
        )


class _Monitors:
    """The monitors of a cache: one, unless its layers differ in shape or device."""

    def __init__(self, policy: Spectral, num_layers: int) -> None:
        self._policy = policy
        self._num_layers = num_layers
        self._by_shape: dict[tuple[object, ...], Monitor] = {}
        self._capacities: dict[tuple[Monitor, int], int] = {}  # what each layer asked for last
        self._lock = threading.Lock()

    def get(self, seen: Observation, capacity: int) -> tuple[Monitor, bool]:
        """Return the monitor for a layer that shows `seen`, and whether it is new.

        On CUDA, where to take memory is to wait, the first one has `capacity` slots in each layer
        at once.
        """
        batch, query_heads, _, head_dim = seen.query.shape
        heads, device = seen.keys.shape[1], seen.keys.device
        rotary = seen.rotary if self._policy.unrotate else None
        if rotary is None or 2 * len(rotary.inv_freq) > head_dim:
            rotary = Rotary()
        shape = (batch, query_heads, heads, head_dim, device, rotary)
        with self._lock:
            monitor = self._by_shape.get(shape)
            if monitor is not None:
                return monitor, False
            # Where layers differ, another monitor's share of them is not known.
            if self._by_shape or device.type != "cuda":
                capacity = 0
            monitor = _taken(
                lambda: self._make(batch, query_heads, heads, head_dim, device, rotary, capacity)
            )
            self._by_shape[shape] = monitor
            return monitor, True

    def __deepcopy__(self, memo: dict[int, object]) -> _Monitors:
        copied = _Monitors(self._policy, self._num_layers)
        with self._lock:
            copied._by_shape = copy.deepcopy(self._by_shape, memo)
            copied._capacities = copy.deepcopy(self._capacities, memo)
        return copied

    def clear(self) -> None:
        """Forget all monitors."""
        with self._lock:
            self._by_shape.clear()
            self._capacities.clear()

    def ask(self, monitor: Monitor, layer: int, capacity: int) -> None:
        """Note how many slots a layer needs."""
        with self._lock:
            self._capacities[monitor, layer] = capacity

    def fit(self, monitor: Monitor) -> None:
        """Give each layer the slots that it asked for, and none to those of other monitors.

        To take or give back memory is to wait for a CUDA device: done for all layers together, one
        wait is all there is.
        """
        wanted = dict.fromkeys(range(self._num_layers), 0)
        with self._lock:
            wanted |= {layer: n for (one, layer), n in self._capacities.items() if one is monitor}
        for layer, capacity in wanted.items():
            is_even = not monitor.graph.rooms(layer)
            if is_even and monitor.graph.capacity(layer) != capacity:
                _reserve(monitor, layer, capacity)

    def _make(
        self,
        batch: int,
        query_heads: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        rotary: Rotary,
        capacity: int,
    ) -> Monitor:
        policy = self._policy
        budgets = policy.head_budgets
        if budgets and len(budgets[0]) != heads:
            raise ValueError(
                f"[{policy.name}] head_shares must be those of {heads} KV heads a layer, got "
                f"{len(budgets[0])}"
            )
        graph, walk = policy._graph_and_walk(
            GraphConfig(
                num_layers=self._num_layers,
                batch_size=batch,
                num_query_heads=query_heads,
                num_kv_heads=heads,
                head_dim=head_dim,
                capacity=capacity,
                device=str(device),
                rotary=rotary,
            )
        )
        return Monitor(
            graph,
            walk,
            policy._eviction(),
            solver=policy.solver,
            walk_interval=policy.walk_interval,
            row_stride=policy.row_stride,
            prompt_rows=policy.prompt_rows,
            head_budgets=budgets,
            stream=torch.cuda.current_stream(device) if device.type == "cuda" else None,
        )


def _taken(take: Callable[[], _T]) -> _T:
    """Return what `take` does, which takes memory of the device."""
    try:
        return take()
    except CudaError:
        # What torch has freed it keeps for itself, out of the core's reach.
        torch.cuda.empty_cache()
        return take()


def _reserve(monitor: Monitor, layer: int, capacity: int) -> None:
    _taken(lambda: monitor.graph.reserve(layer, capacity))


class _SpectralTracker(AttendingTracker):
    checks_kept = True

    def __init__(
        self, policy: Spectral, layer: int, monitors: _Monitors, rooms: tuple[int, ...] | None
    ) -> None:
        self._policy = policy
        self._layer = layer
        self._monitors = monitors
        self._monitor: Monitor | None = None
        self._counts_memory = False
        self._capacity = 0
        self._keys: torch.Tensor | None = None
        self._steps = 0  # decode steps observed, of which every `scan_interval`-th draws a row
        self._chosen: torch.Tensor | None = None  # what `keep` returned last
        self._kept: list[int] = []  # and how many of it each sequence, or each head, keeps
        self._rooms = self._first_rooms = rooms
        self._divided_at = 0  # tokens seen when heads last competed

    def observe(self, observation: Observation) -> None:
        if self._monitor is None:
            capacity = max(self._capacity, observation.keys.shape[2])
            self._monitor, self._counts_memory = self._monitors.get(observation, capacity)
            self.reserve(capacity)
        if observation.keys.shape[2] > self._capacity:
            self.reserve(observation.keys.shape[2])
        if self._monitor.graph.capacity(self._layer) > _SPARE * self._capacity:
            self._monitors.fit(self._monitor)
        self._keys = observation.keys
        is_step = observation.query.shape[2] == 1
        if is_step and not self._draws_row():
            self._monitor.admit(
                self._layer, observation.query, observation.keys, valid=observation.new_valid
            )
        elif is_step and observation.new_valid is None:
            self._monitor.on_step(
                self._layer,
                observation.query[:, :, 0],
                observation.keys,
                scale=observation.scaling,
                softcap=observation.softcap,
            )
        else:
            self._monitor.on_prefill(
                self._layer,
                observation.query,
                observation.keys,
                valid=observation.new_valid,
                scale=observation.scaling,
                softcap=observation.softcap,
            )

    def _draws_row(self) -> bool:
        """Count a decode step, and return whether it is this layer's turn."""
        turn = (self._steps + self._layer) % self._policy.scan_interval
        self._steps += 1
        return turn == 0

    def standing_obstacle(self) -> str | None:
        interval = self._policy.scan_interval
        return None if interval == 1 else f"scan_interval=1, got {interval}"

    def obstacle(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
        standing = self.standing_obstacle()
        if standing is not None:
            return standing
        dtypes = [tensor.dtype for tensor in (query, keys, values)]
        if len(set(dtypes)) > 1:
            return f"queries, keys and values of one dtype, got {dtypes}"
        if keys.shape[3] != values.shape[3]:
            return f"keys and values of one size, got {keys.shape[3]} and {values.shape[3]}"
        group, dim = query.shape[1] // keys.shape[1], keys.shape[3]
        if keys.is_cuda and (dim > _MOST_CUDA_DIM or group * dim > _MOST_CUDA_SUMS):
            return (
                f"at most {_MOST_CUDA_DIM} dimensions, and {_MOST_CUDA_SUMS} of all query heads of "
                f"a KV head together, got {group} heads of {dim}"
            )
        return None

    def attend(self, step: DecodeStep) -> torch.Tensor:
        monitor, graph = self._active(), self._active().graph
        capacity = step.keys.shape[2]
        # Steps under capture are sized by it.
        if graph.capacity(self._layer) != capacity and not graph.rooms(self._layer):
            self._monitors.ask(monitor, self._layer, capacity)
            self._monitors.fit(monitor)
        self._keys, self._capacity = step.keys, capacity
        slots = graph.place(self._layer, step.new_keys, step.new_values, step.keys, step.values)
        attended: torch.Tensor = monitor.attend(
            self._layer,
            step.query,
            step.keys,
            step.values,
            slots=slots,
            scale=step.scaling,
            softcap=step.softcap,
        )
        return attended

    @property
    def may_divide(self) -> bool:
        return self._policy.head_shares is not None and self._policy.budget is not None

    @property
    def rooms(self) -> tuple[int, ...] | None:
        return self._rooms

    def divides_anew(self, seen: int) -> bool:
        return self._policy._competes and seen >= _GROWTH * self._divided_at

    def show_keys(self, keys: torch.Tensor) -> None:
        self._keys = keys

    def _compete(self) -> None:
        """Give the heads of an even layer, which is about to be cut, what their visits win."""
        policy, monitor, keys = self._policy, self._active(), self._keys
        graph, layer, budget = monitor.graph, self._layer, policy.budget
        if not policy._competes or budget is None or keys is None or graph.rooms(layer):
            return
        seen = [graph.tokens_seen(layer, b) for b in range(graph.batch_size(layer))]
        if not self.divides_anew(max(seen)):
            return
        monitor.renew(layer, keys)
        scores = graph.scores(layer, like=self._like(), population=0)
        positions = self.positions()
        newest = host_numbers(seen, positions.device)[:, None, None]
        free = (positions >= policy.sinks) & (positions < newest - policy.window)
        # A sequence that keeps all it has needs no head more than another.
        long = [b for b, count in enumerate(seen) if count > budget]
        places = policy.places_to_compete_for
        sure = max(1, int(policy.head_floor * places))  # no head can do with sinks and window alone
        won = places_won(scores[None, long], free[None, long], places, sure)[0].mean(0)
        held = (positions >= 0).sum(-1).amax(0)
        wins, most = torch.stack((won, held.to(won.dtype))).tolist()  # waits for the device, once
        budgets = [budget - places + int(count) for count in wins]
        # Some head must be cut now, so that all layers stay in step.
        first = min(range(len(budgets)), key=lambda head: budgets[head] - most[head])
        budgets[first] = min(budgets[first], int(most[first]) - 1)
        monitor.set_head_budgets(layer, budgets)
        self._rooms = tuple(tokens + policy.cut_interval for tokens in budgets)
        self._divided_at = max(seen)

    def divide(self) -> None:
        graph, rooms = self._active().graph, self._rooms
        if rooms is None:
            super().divide()
            return
        # A view of the former slab would keep all of it alive.
        self._keys = None
        _taken(lambda: graph.divide(self._layer, rooms))

    def release(self, keep: torch.Tensor) -> None:
        self._active().graph.release(self._layer, keep, kept=self._counts_of(keep))
        self._chosen = None

    @classmethod
    def keep_all(cls, trackers: Sequence[AttendingTracker]) -> list[torch.Tensor]:
        keeps: dict[tuple[Monitor, int], torch.Tensor] = {}
        for monitor, ours in _by_monitor(trackers).items():
            for one in ours:
                one._compete()
            force = ours[0]._rooms is not None
            kept = {one._layer: monitor.kept_counts(one._layer, force=force) for one in ours}
            chosen = monitor.keep_all({one._layer: one._keys for one in ours}, force=force)
            for one in ours:
                one._kept, one._chosen = kept[one._layer], chosen[one._layer]
                keeps[monitor, one._layer] = chosen[one._layer]
        return [keeps[one._active(), one._layer] for one in _own(trackers)]

    @classmethod
    def settle(cls, trackers: Sequence[AttendingTracker]) -> None:
        for monitor in _by_monitor(trackers):
            monitor.graph.refresh()
            monitor.graph.synchronize()

    def capture_obstacle(self) -> str | None:
        interval = self._policy.walk_interval
        return None if interval == 0 else f"walk_interval=0, got {interval}"

    def held(self) -> torch.Tensor:
        graph = self._active().graph
        never = EvictionConfig(budget=_MOST_SLOTS - 1, interval=1)
        self._kept = graph.kept_counts(self._layer, never)
        self._chosen = graph.select(self._layer, never, like=self._like())
        return self._chosen

    def positions(self) -> torch.Tensor:
        positions: torch.Tensor = self._active().graph.positions(self._layer, like=self._like())
        return positions

    @property
    def num_slots(self) -> int:
        return 0 if self._monitor is None else self._monitor.graph.length(self._layer)

    def scores(self) -> torch.Tensor:
        """Return the visits of all populations together, as of the last walk."""
        scores: torch.Tensor = self._active().graph.scores(self._layer, like=self._like())
        return scores

    def keep(self) -> torch.Tensor | None:
        monitor, keys = self._active(), self._keys
        if keys is None or not monitor.is_full(self._layer):
            return None
        self._compete()
        self._kept = monitor.kept_counts(self._layer)
        keep: torch.Tensor = monitor.keep(self._layer, keys)
        self._chosen = keep
        return keep

    def compact(self, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        kept = self._counts_of(keep)
        self._active().graph.compact(self._layer, keep, keys, values, kept=kept)
        self._chosen = None
        self._keys = keys[:, :, : keep.shape[2]]

    def truncate(self, count: int) -> None:
        self._keys = None
        self._steps -= count  # steps that are taken back and fed again draw the same rows
        if self._monitor is not None:
            self._monitor.graph.truncate(self._layer, count)

    def select_batch(self, indices: torch.Tensor) -> None:
        self._keys = None
        if self._monitor is not None:
            self._monitor.graph.select_batch(self._layer, indices.tolist())

    def reserve(self, capacity: int) -> None:
        # A view of the former slab would keep all of it alive.
        self._keys = None
        self._capacity = capacity
        if self._monitor is None:
            return
        self._monitors.ask(self._monitor, self._layer, capacity)
        graph = self._monitor.graph
        # A prompt in chunks would wait for a CUDA device twice at each, and a cut in each layer:
        # what one chunk needed stays for the next, and what comes then gives back a lot.
        is_even = not graph.rooms(self._layer)
        if (
            is_even
            and graph.graph_config.device != "cpu"
            and capacity <= graph.capacity(self._layer)
        ):
            return
        _reserve(self._monitor, self._layer, capacity)

    def reset(self) -> None:
        # Of the next batch the number of sequences may be another.
        self._keys, self._monitor, self._counts_memory, self._steps = None, None, False, 0
        self._rooms, self._divided_at = self._first_rooms, 0
        self._monitors.clear()

    def state_dict(self) -> dict[str, torch.Tensor]:
        if self._monitor is None:
            return {}
        saved = bytearray(self._monitor.graph.save_layer(self._layer))
        state = {"graph": torch.frombuffer(saved, dtype=torch.uint8)}
        if self._policy.scan_interval > 1:
            state["steps"] = torch.tensor(self._steps)
        rooms = self._monitor.graph.rooms(self._layer)
        if rooms:
            state["rooms"] = torch.tensor(rooms)
            state["divided_at"] = torch.tensor(self._divided_at)
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor], held: Observation) -> None:
        if "graph" not in state:
            return
        slots = held.keys.shape[2]
        self._monitor, self._counts_memory = self._monitors.get(held, slots)
        is_divided = "rooms" in state
        if is_divided:
            self._rooms = tuple(state["rooms"].tolist())
            self._divided_at = int(state["divided_at"])
            if self._policy._competes:
                interval = self._policy.cut_interval
                budgets = [room - interval for room in self._rooms]
                self._monitor.set_head_budgets(self._layer, budgets)
            self.divide()
        else:
            self.reserve(slots)
        self._monitor.graph.load_layer(self._layer, state["graph"].cpu().numpy().tobytes())
        self._steps = int(state["steps"]) if "steps" in state else 0
        self._keys = None if is_divided else held.keys

    def nbytes(self) -> int:
        if self._monitor is None or not self._counts_memory:
            return 0
        return int(self._monitor.graph.memory_use().graph_bytes)

    def _counts_of(self, keep: torch.Tensor) -> list[int]:
        """Return how many slots each sequence keeps; empty: it is not known."""
        return self._kept if keep is self._chosen else []

    def _like(self) -> torch.Tensor:
        """Return a tensor that tells results their device."""
        return torch.empty(0, device=self._active().graph.graph_config.device)

    def _active(self) -> Monitor:
        if self._monitor is None:
            raise RuntimeError("[spectral] there is nothing to rank: no token was observed")
        return self._monitor


def renew(trackers: Sequence[Tracker | None]) -> None:
    """Renew the scores of a cache's layers now, whether or not a cut is due."""
    own = [tracker for tracker in trackers if isinstance(tracker, _SpectralTracker)]
    for monitor, ours in _by_monitor(own).items():
        if monitor.graph.walk_config.needs_novelty:
            for one in ours:
                monitor.graph.update_novelty(one._layer, one._keys)
        for one in ours:
            monitor.graph.walk(one._layer)


def _own(trackers: Sequence[AttendingTracker]) -> list[_SpectralTracker]:
    return [tracker for tracker in trackers if isinstance(tracker, _SpectralTracker)]


def _by_monitor(trackers: Sequence[AttendingTracker]) -> dict[Monitor, list[_SpectralTracker]]:
    groups: dict[Monitor, list[_SpectralTracker]] = {}
    for tracker in _own(trackers):
        groups.setdefault(tracker._active(), []).append(tracker)
    return groups
