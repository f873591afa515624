"""Bindings of libspectralkv."""

from collections.abc import Sequence
import enum
from typing import Annotated

from numpy.typing import NDArray


__version__: str

def built_with_cuda() -> bool:
    """
    True when the CUDA backend was compiled in, whether or not there is a device for it.
    """

def cuda_device_count() -> int:
    """
    CUDA devices that can be used now; 0 without backend, driver or device.
    """

def cuda_status() -> str:
    """Why ``cuda_device_count()`` is 0; empty when it is not."""

def cuda_device_name(index: int) -> str:
    """Name of a CUDA device; empty where there is no such device."""

def cuda_driver_version() -> int:
    """
    Newest CUDA that the driver supports, as 1000 * major + 10 * minor; 0 without a driver.
    """

def cpu_simd() -> str:
    """Instruction set that the CPU backend uses here."""

def cpu_threads() -> int:
    """Threads that the CPU backend uses unless told otherwise."""

class SpectralKVError(Exception):
    pass

class InvalidArgument(SpectralKVError, ValueError):
    pass

class BackendUnavailable(SpectralKVError, RuntimeError):
    pass

class CudaError(SpectralKVError, RuntimeError):
    pass

class EdgeLaw(enum.Enum):
    """How a token's row stores its neighbours."""

    uniform = 0

    weighted = 1

    attention = 2

class GraphScope(enum.Enum):
    """Which heads share a graph."""

    head = 0

    layer = 1

class Restart(enum.Enum):
    """Where a walker goes when it restarts."""

    current = 0

    recent = 1

    novelty = 2

class VisitCount(enum.Enum):
    """Which arrivals a visit counts."""

    edges = 0

    all = 1

class Solver(enum.Enum):
    """How scores are found."""

    walk = 0

    exact = 1

class DeviceType(enum.Enum):
    """Kind of device."""

    cpu = 0

    cuda = 1

class Device:
    """Where memory lies."""

    def __init__(self, type: DeviceType = DeviceType.cpu, index: int = 0) -> None: ...

    @property
    def type(self) -> DeviceType: ...

    @type.setter
    def type(self, arg: DeviceType, /) -> None: ...

    @property
    def index(self) -> int: ...

    @index.setter
    def index(self, arg: int, /) -> None: ...

class Rotary:
    """How keys were turned by their positions."""

    def __init__(self) -> None: ...

    @property
    def inv_freq(self) -> list[float]: ...

    @inv_freq.setter
    def inv_freq(self, arg: Sequence[float], /) -> None: ...

    @property
    def interleaved(self) -> bool: ...

    @interleaved.setter
    def interleaved(self, arg: bool, /) -> None: ...

class GraphConfig:
    """Shape and memory of the graphs of one model."""

    def __init__(self) -> None: ...

    @property
    def num_layers(self) -> int: ...

    @num_layers.setter
    def num_layers(self, arg: int, /) -> None: ...

    @property
    def batch_size(self) -> int: ...

    @batch_size.setter
    def batch_size(self, arg: int, /) -> None: ...

    @property
    def num_query_heads(self) -> int: ...

    @num_query_heads.setter
    def num_query_heads(self, arg: int, /) -> None: ...

    @property
    def num_kv_heads(self) -> int: ...

    @num_kv_heads.setter
    def num_kv_heads(self, arg: int, /) -> None: ...

    @property
    def head_dim(self) -> int: ...

    @head_dim.setter
    def head_dim(self, arg: int, /) -> None: ...

    @property
    def capacity(self) -> int: ...

    @capacity.setter
    def capacity(self, arg: int, /) -> None: ...

    @property
    def top_k(self) -> int: ...

    @top_k.setter
    def top_k(self, arg: int, /) -> None: ...

    @property
    def edge_law(self) -> EdgeLaw: ...

    @edge_law.setter
    def edge_law(self, arg: EdgeLaw, /) -> None: ...

    @property
    def pack_rows(self) -> bool: ...

    @pack_rows.setter
    def pack_rows(self, arg: bool, /) -> None: ...

    @property
    def scope(self) -> GraphScope: ...

    @scope.setter
    def scope(self, arg: GraphScope, /) -> None: ...

    @property
    def num_sinks(self) -> int: ...

    @num_sinks.setter
    def num_sinks(self, arg: int, /) -> None: ...

    @property
    def seed(self) -> int: ...

    @seed.setter
    def seed(self, arg: int, /) -> None: ...

    @property
    def head_offset(self) -> int: ...

    @head_offset.setter
    def head_offset(self, arg: int, /) -> None: ...

    @property
    def total_kv_heads(self) -> int: ...

    @total_kv_heads.setter
    def total_kv_heads(self, arg: int, /) -> None: ...

    @property
    def device(self) -> Device: ...

    @device.setter
    def device(self, arg: Device, /) -> None: ...

    @property
    def num_threads(self) -> int: ...

    @num_threads.setter
    def num_threads(self, arg: int, /) -> None: ...

    @property
    def eager_checks(self) -> bool: ...

    @eager_checks.setter
    def eager_checks(self, arg: bool, /) -> None: ...

    @property
    def rotary(self) -> Rotary: ...

    @rotary.setter
    def rotary(self, arg: Rotary, /) -> None: ...

    def validate(self) -> None: ...

class Population:
    """A part of the walkers with its restart and count."""

    def __init__(self) -> None: ...

    @property
    def restart(self) -> Restart: ...

    @restart.setter
    def restart(self, arg: Restart, /) -> None: ...

    @property
    def count(self) -> VisitCount: ...

    @count.setter
    def count(self, arg: VisitCount, /) -> None: ...

    @property
    def share(self) -> float: ...

    @share.setter
    def share(self, arg: float, /) -> None: ...

    @property
    def recent_fraction(self) -> float: ...

    @recent_fraction.setter
    def recent_fraction(self, arg: float, /) -> None: ...

    @property
    def recent_tokens(self) -> int: ...

    @recent_tokens.setter
    def recent_tokens(self, arg: int, /) -> None: ...

    @property
    def decay(self) -> float | None: ...

    @decay.setter
    def decay(self, arg: float | None, /) -> None: ...

    @property
    def solver(self) -> Solver: ...

    @solver.setter
    def solver(self, arg: Solver, /) -> None: ...

class WalkConfig:
    """Personalized PageRank by random walks."""

    def __init__(self) -> None: ...

    @property
    def num_walkers(self) -> int: ...

    @num_walkers.setter
    def num_walkers(self, arg: int, /) -> None: ...

    @property
    def walk_length(self) -> int: ...

    @walk_length.setter
    def walk_length(self, arg: int, /) -> None: ...

    @property
    def restart_prob(self) -> float: ...

    @restart_prob.setter
    def restart_prob(self, arg: float, /) -> None: ...

    @property
    def decay(self) -> float: ...

    @decay.setter
    def decay(self, arg: float, /) -> None: ...

    @property
    def novelty_width(self) -> int: ...

    @novelty_width.setter
    def novelty_width(self, arg: int, /) -> None: ...

    @property
    def populations(self) -> list[Population]: ...

    @populations.setter
    def populations(self, arg: Sequence[Population], /) -> None: ...

    def validate(self) -> None: ...

class EvictionConfig:
    """When a cache is cut, and what stays."""

    def __init__(self) -> None: ...

    @property
    def budget(self) -> int: ...

    @budget.setter
    def budget(self, arg: int, /) -> None: ...

    @property
    def interval(self) -> int: ...

    @interval.setter
    def interval(self, arg: int, /) -> None: ...

    @property
    def window(self) -> int: ...

    @window.setter
    def window(self, arg: int, /) -> None: ...

    @property
    def sinks(self) -> int: ...

    @sinks.setter
    def sinks(self, arg: int, /) -> None: ...

    @property
    def head_budgets(self) -> list[int]: ...

    @head_budgets.setter
    def head_budgets(self, arg: Sequence[int], /) -> None: ...

    def validate(self) -> None: ...

class MonitorConfig:
    """Settings of a Monitor."""

    def __init__(self) -> None: ...

    @property
    def eviction(self) -> EvictionConfig: ...

    @eviction.setter
    def eviction(self, arg: EvictionConfig, /) -> None: ...

    @property
    def head_budgets(self) -> list[list[int]]: ...

    @head_budgets.setter
    def head_budgets(self, arg: Sequence[Sequence[int]], /) -> None: ...

    @property
    def solver(self) -> Solver: ...

    @solver.setter
    def solver(self, arg: Solver, /) -> None: ...

    @property
    def walk_interval(self) -> int: ...

    @walk_interval.setter
    def walk_interval(self, arg: int, /) -> None: ...

    @property
    def top_fraction(self) -> float: ...

    @top_fraction.setter
    def top_fraction(self, arg: float, /) -> None: ...

    @property
    def row_stride(self) -> int: ...

    @row_stride.setter
    def row_stride(self, arg: int, /) -> None: ...

    @property
    def prompt_rows(self) -> int: ...

    @prompt_rows.setter
    def prompt_rows(self, arg: int, /) -> None: ...

    def validate(self) -> None: ...

def apply_preset(name: str, graph: GraphConfig, walk: WalkConfig) -> None:
    """Set edge law, top_k and the walk to a named choice."""

def decode_attention(query: Annotated[NDArray, dict(writable=False)], keys: Annotated[NDArray, dict(writable=False)], values: Annotated[NDArray, dict(writable=False)], positions: Annotated[NDArray, dict(writable=False)] | None, length: int, out: NDArray, scale: float = 0.0, softcap: float = 0.0, stream: int = 0) -> None:
    """Attention of one token a sequence over slots [0, length) of its cache."""

ALL_LAYERS: int = -1

class Statistics:
    """Counts since construction."""

    @property
    def rows_written(self) -> int: ...

    @property
    def rows_nonfinite(self) -> int: ...

    @property
    def walks(self) -> int: ...

    @property
    def solves(self) -> int: ...

    @property
    def evicted(self) -> int: ...

class MemoryUse:
    """Bytes held by a manager."""

    @property
    def graph_bytes(self) -> int: ...

    @property
    def scratch_bytes(self) -> int: ...

class GraphManager:
    """The attention graphs of a model."""

    def __init__(self, graph: GraphConfig, walk: WalkConfig, stream: int = 0) -> None: ...

    def use_stream(self, stream: int) -> None: ...

    def update(self, layer: int, query: Annotated[NDArray, dict(writable=False)], keys: Annotated[NDArray, dict(writable=False)], slots: Annotated[NDArray, dict(writable=False)] | None = None, scale: float = 0.0, softcap: float = 0.0, stream: int = 0) -> None: ...

    def attend(self, layer: int, query: Annotated[NDArray, dict(writable=False)], keys: Annotated[NDArray, dict(writable=False)], values: Annotated[NDArray, dict(writable=False)], slots: Annotated[NDArray, dict(writable=False)] | None, out: NDArray, scale: float = 0.0, softcap: float = 0.0, stream: int = 0) -> None: ...

    def update_rows(self, layer: int, queries: Annotated[NDArray, dict(writable=False)], keys: Annotated[NDArray, dict(writable=False)], valid: Annotated[NDArray, dict(writable=False)] | None = None, scale: float = 0.0, softcap: float = 0.0, row_stride: int = 1, stream: int = 0) -> None: ...

    def update_novelty(self, layer: int, keys: Annotated[NDArray, dict(writable=False)], stream: int = 0) -> None: ...

    def walk(self, layer: int = -1, sequences: Sequence[int] = [], stream: int = 0, beside: bool = True) -> None: ...

    def solve(self, layer: int = -1, sequences: Sequence[int] = [], stream: int = 0, beside: bool = True) -> None: ...

    def update_and_step(self, layer: int, query: Annotated[NDArray, dict(writable=False)], keys: Annotated[NDArray, dict(writable=False)], slots: Annotated[NDArray, dict(writable=False)] | None = None, scale: float = 0.0, softcap: float = 0.0, stream: int = 0) -> None: ...

    def scores(self, layer: int, out: NDArray, population: int = -1, stream: int = 0) -> None: ...

    def visits(self, layer: int, out: NDArray, population: int = 0, stream: int = 0) -> None: ...

    def is_full(self, layer: int, eviction: EvictionConfig) -> bool: ...

    def full_sequences(self, layer: int, eviction: EvictionConfig, force: bool = False) -> list[int]: ...

    def kept_length(self, layer: int, eviction: EvictionConfig, force: bool = False) -> int: ...

    def kept_counts(self, layer: int, eviction: EvictionConfig, force: bool = False) -> list[int]: ...

    def select(self, layer: int, eviction: EvictionConfig, force: bool, out: NDArray, stream: int = 0) -> None: ...

    def safety_mask(self, layer: int, eviction: EvictionConfig, top_fraction: float, out: NDArray, stream: int = 0) -> None: ...

    def compact(self, layer: int, keep: Annotated[NDArray, dict(writable=False)], keys: NDArray | None = None, values: NDArray | None = None, kept: Sequence[int] = [], stream: int = 0) -> None: ...

    def release(self, layer: int, keep: Annotated[NDArray, dict(writable=False)], kept: Sequence[int] = [], stream: int = 0) -> None: ...

    def next_slots(self, layer: int, out: NDArray, stream: int = 0) -> None: ...

    def place(self, layer: int, new_keys: Annotated[NDArray, dict(writable=False)], new_values: Annotated[NDArray, dict(writable=False)], keys: NDArray, values: NDArray, slots: NDArray, stream: int = 0) -> None: ...

    def truncate(self, layer: int, count: int) -> None: ...

    def select_batch(self, layer: int, sequences: Sequence[int]) -> None: ...

    def reset(self, layer: int = -1, sequence: int | None = None) -> None: ...

    def reserve(self, layer: int, capacity: int) -> None: ...

    def divide(self, layer: int, rooms: Sequence[int]) -> None: ...

    def synchronize(self) -> None: ...

    def refresh(self) -> None: ...

    def length(self, layer: int) -> int: ...

    def capacity(self, layer: int) -> int: ...

    def rooms(self, layer: int) -> list[int]: ...

    def batch_size(self, layer: int) -> int: ...

    def graphs_per_sequence(self) -> int: ...

    def tokens_seen(self, layer: int, sequence: int) -> int: ...

    def tokens_held(self, layer: int, sequence: int) -> int: ...

    def tokens_walked(self, layer: int, sequence: int) -> int: ...

    def positions(self, layer: int, out: NDArray, stream: int = 0) -> None: ...

    def rows(self, layer: int, neighbors: NDArray, probabilities: NDArray, stream: int = 0) -> None: ...

    def load_rows(self, layer: int, positions: Annotated[NDArray, dict(writable=False)], neighbors: Annotated[NDArray, dict(writable=False)], probabilities: Annotated[NDArray, dict(writable=False)], stream: int = 0) -> None: ...

    def load_restart_weights(self, layer: int, weights: Annotated[NDArray, dict(writable=False)], stream: int = 0) -> None: ...

    def restart_distribution(self, layer: int, population: int, out: NDArray, stream: int = 0) -> None: ...

    def save_layer(self, layer: int) -> bytes: ...

    def load_layer(self, layer: int, saved: bytes) -> None: ...

    def statistics(self) -> Statistics: ...

    def memory_use(self) -> MemoryUse: ...

class Monitor:
    """The controller for an engine's loop."""

    def __init__(self, graph: GraphConfig, walk: WalkConfig, monitor: MonitorConfig, stream: int = 0) -> None: ...

    def on_prefill(self, layer: int, queries: Annotated[NDArray, dict(writable=False)], keys: Annotated[NDArray, dict(writable=False)], valid: Annotated[NDArray, dict(writable=False)] | None = None, scale: float = 0.0, softcap: float = 0.0, stream: int = 0) -> None: ...

    def on_prefill_end(self, layer: int, keys: Annotated[NDArray, dict(writable=False)], stream: int = 0) -> None: ...

    def on_step(self, layer: int, query: Annotated[NDArray, dict(writable=False)], keys: Annotated[NDArray, dict(writable=False)], slots: Annotated[NDArray, dict(writable=False)] | None = None, scale: float = 0.0, softcap: float = 0.0, stream: int = 0) -> None: ...

    def renew_due(self, layer: int, keys: Annotated[NDArray, dict(writable=False)], stream: int = 0) -> None: ...

    def on_finish(self, sequence: int) -> None: ...

    def is_full(self, layer: int) -> bool: ...

    def kept_length(self, layer: int) -> int: ...

    def set_head_budgets(self, layer: int, budgets: Sequence[int]) -> None: ...

    def keep(self, layer: int, keys: Annotated[NDArray, dict(writable=False)], out: NDArray, stream: int = 0) -> None: ...

    def safety_mask(self, layer: int, out: NDArray, stream: int = 0) -> None: ...

    @property
    def graph(self) -> GraphManager: ...
