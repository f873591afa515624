"""The caches that `spectralkv bench` compares: each is filled, and takes decode steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    import torch

    from spectralkv.hf import EvictingCache
    from spectralkv.policies.base import Policy
    from spectralkv.policies.head_shares import HeadBudgets

#: Groups of caches, as they are chosen by name.
GROUPS = ("dynamic", "static", "fused", "loop", "policy", "model", "quantized", "kvpress")
#: Groups that keep everything, exactly.
FULL_GROUPS = ("dynamic", "static", "fused")
# Steps before the clock runs, where nothing is cut.
_WARM_UP = 2
# Steps before a capture: they run what allocates or compiles at its first use.
_STEPS_BEFORE_CAPTURE = 3
# Steps that are left until the first cut: it comes before the clock runs.
_STEPS_BEFORE_CUT = 2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a cache is made for.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model.
    batch, context : int
        Sequences, and tokens before the first step.
    policy : spectralkv.policies.Policy or None
        What an evicting cache keeps.
    steps : int
        Steps that follow those of `Subject.warm_up`, at most.
    chunk : int
        Tokens of a sequence that an evicting cache is filled with at a time.
    compiled : str
        Backend by which steps of static caches and of the captured loop are compiled; "": they are
        not.
    """

    model: Any
    batch: int
    context: int
    policy: Policy | None
    steps: int
    chunk: int
    compiled: str = ""

    @property
    def budget(self) -> int:
        """Tokens that an evicting cache keeps."""
        if self.policy is None or self.policy.budget is None:
            raise ValueError("[bench] expected a policy with a budget, got none")
        return self.policy.budget

    @property
    def interval(self) -> int:
        """Steps from one cut to the next."""
        if self.policy is None:
            raise ValueError("[bench] expected a policy, got none")
        return self.policy.cut_interval

    @property
    def head_budgets(self) -> HeadBudgets:
        """Tokens that each head keeps, (L, Hkv); empty: all keep the budget."""
        return getattr(self.policy, "head_budgets", ())


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A filled cache and the steps that it takes.

    Attributes
    ----------
    cache : transformers.Cache
        The cache.
    run : callable
        Takes so many steps.
    warm_up : int
        Steps before the clock runs.
    period : int
        Steps after which the work of a step repeats: one cut is among them.
    is_captured : callable
        Whether steps are replayed as a CUDA graph.
    """

    cache: Any
    run: Callable[[int], None]
    warm_up: int = _WARM_UP
    period: int = 1
    is_captured: Callable[[], bool] = lambda: False


@dataclass(frozen=True, kw_only=True)
class CacheKind:
    """A cache that is measured.

    Attributes
    ----------
    name : str
        The cache, and how it is driven.
    group : str
        One of :data:`GROUPS`.
    open : callable
        Makes and fills it; what it returns is entered to get the :class:`Subject`.
    share : float or None
        Part of the context that it keeps; None: all.
    """

    name: str
    group: str
    open: Callable[[Setting], AbstractContextManager[Subject]]
    share: float | None = None

    @property
    def is_rival(self) -> bool:
        """Whether other people's code can fail in it without ours being at fault."""
        return self.group in ("quantized", "kvpress")


def cache_kinds(
    groups: Sequence[str], shares: Sequence[float], eager_shares: Sequence[float]
) -> tuple[list[CacheKind], list[str]]:
    """Return the caches of some groups, and a line for each that is left out.

    Parameters
    ----------
    groups : sequence of str
        Of :data:`GROUPS`.
    shares : sequence of float
        Budgets of the captured loop, as parts of the context.
    eager_shares : sequence of float
        Budgets of the caches that are driven by a plain loop.

    Returns
    -------
    kinds : list of CacheKind
        Presses last: importing kvpress puts wrappers around attention.
    notes : list of str
        What is left out, why, and what to install.
    """
    whole: dict[str, tuple[str, Callable[[Setting], AbstractContextManager[Subject]]]] = {
        "fused": ("StaticCache fused", _fused),
        "static": ("StaticCache", _static),
        "dynamic": ("DynamicCache", _dynamic),
    }
    kinds = [
        CacheKind(name=name, group=group, open=make)
        for group, (name, make) in whole.items()
        if group in groups
    ]
    ours: dict[str, tuple[Sequence[float], Callable[[Setting], AbstractContextManager[Subject]]]]
    ours = {
        "loop": (shares, _loop),
        "policy": (eager_shares, partial(_evicting, attention="policy")),
        "model": (eager_shares, partial(_evicting, attention="model")),
    }
    kinds += [
        CacheKind(name=f"Spectral {group}", group=group, open=make, share=share)
        for group, (budgets, make) in ours.items()
        if group in groups
        for share in budgets
    ]
    notes: list[str] = []
    if "quantized" in groups:
        backends, note = _quantized_backends()
        kinds += [
            CacheKind(
                name=f"QuantizedCache {backend}",
                group="quantized",
                open=partial(_quantized, backend=backend),
            )
            for backend in backends
        ]
        notes += note
    if "kvpress" in groups:
        if not _is_installed("kvpress"):
            notes.append("left out: presses of kvpress, which is missing (pip install kvpress)")
        else:
            kinds += [
                CacheKind(
                    name=f"kvpress {press}",
                    group="kvpress",
                    open=partial(_pressed, press=press),
                    share=share,
                )
                for press in ("Knorm", "SnapKV")
                for share in eager_shares
            ]
    return kinds, notes


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Return bytes of keys and values, and of what a policy keeps beside them."""
    if hasattr(cache, "stats"):
        stats = cache.stats()
        return stats.kv_bytes, stats.graph_bytes
    storages = {}
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if "keys" not in name and "values" not in name:
                continue
            for tensor in _tensors(value):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()), 0


def fill(model: Any, cache: Any, *, batch: int, count: int, chunk: int | None = None) -> None:
    """Put random keys and values into a cache, in the way that a model does.

    Neither how long a step takes nor its memory depends on what they are, and a real prompt of
    100,000 tokens takes longer than all that is measured.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Tells shapes, dtype and device.
    cache : transformers.Cache
        It is empty.
    batch, count : int
        Sequences, and tokens of each.
    chunk : int, optional
        Tokens at a time, with random queries for a policy that watches; None: all, no queries.
    """
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config.get_text_config(decoder=True)
    query_heads, heads, dim = _heads(config)
    softcap = getattr(config, "attn_logit_softcapping", None)
    # Evicting caches see queries where the model looks up its attention function.
    attend = ALL_ATTENTION_FUNCTIONS.get_interface("eager", _no_attention)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, dim, dtype=model.dtype, device=model.device)

    for layer in range(config.num_hidden_layers):
        for start in range(0, count, chunk or count):
            tokens = min(chunk or count, count - start)
            held = cache.update(random(heads, tokens), random(heads, tokens), layer)
            if chunk is not None:
                attend(None, random(query_heads, tokens), *held, None, softcap=softcap)


# -- caches that keep everything


@contextmanager
def _dynamic(setting: Setting) -> Iterator[Subject]:
    from transformers import DynamicCache

    cache = DynamicCache(config=setting.model.config)
    fill(setting.model, cache, batch=setting.batch, count=setting.context)
    yield Subject(cache=cache, run=_eager(setting, cache))


@contextmanager
def _static(setting: Setting) -> Iterator[Subject]:
    import torch
    from transformers import StaticCache

    from spectralkv.hf.streams import capture_stream

    model, on_cuda = setting.model, setting.model.device.type == "cuda"
    slots = setting.context + _WARM_UP + setting.steps + (_STEPS_BEFORE_CAPTURE if on_cuda else 0)
    cache = StaticCache(config=model.config, max_cache_len=slots)
    fill(model, cache, batch=setting.batch, count=setting.context)
    run = _eager(setting, cache, compiled=setting.compiled)
    if not on_cuda:
        yield Subject(cache=cache, run=run)
        return
    run(_STEPS_BEFORE_CAPTURE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture_stream(model.device)):
        run(1)

    def replay(count: int) -> None:
        for _ in range(count):
            graph.replay()

    yield Subject(cache=cache, run=replay, is_captured=lambda: True)


@contextmanager
def _fused(setting: Setting) -> Iterator[Subject]:
    """Give the bound: with torch's kernels no cache that keeps everything is faster."""
    from transformers import AttentionInterface

    name, model = "spectralkv_bench_fused", setting.model
    AttentionInterface.register(name, _attend_fused)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        with _static(setting) as subject:
            yield subject
    finally:
        model.set_attn_implementation(before)


def _attend_fused(
    module: torch.nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention to all slots, used or not: transformers makes no mask for this function.

    With a mask torch has no kernel that splits the keys of a head, and transformers writes every
    key once for each query head that reads it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    fastest_first = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(fastest_first, set_priority=True):
        attended = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2).contiguous(), None


# -- caches that evict


@contextmanager
def _evicting(setting: Setting, *, attention: Any) -> Iterator[Subject]:
    cache = _watched(setting, attention)
    yield Subject(
        cache=cache,
        run=_eager(setting, cache),
        warm_up=_STEPS_BEFORE_CUT + 1,
        period=setting.interval,
    )


@contextmanager
def _loop(setting: Setting) -> Iterator[Subject]:
    import torch

    from spectralkv.hf import DecodeLoop

    model, batch = setting.model, setting.batch
    cache = _watched(setting, "auto")
    # The first cut takes memory, the second one is captured.
    warm_up = _STEPS_BEFORE_CUT + setting.interval + 1
    if setting.head_budgets:
        warm_up += setting.interval  # the cut behind the filling is another
    config = model.config.get_text_config(decoder=True)
    loop = DecodeLoop(
        model,
        cache,
        logits=torch.zeros(batch, config.vocab_size, dtype=model.dtype, device=model.device),
        positions=torch.full((batch,), setting.context, device=model.device),
        max_new_tokens=1 + warm_up + setting.steps,
        compiled=setting.compiled or False,
    )
    yield Subject(
        cache=cache,
        run=loop.run,
        warm_up=warm_up,
        period=setting.interval,
        is_captured=lambda: loop.is_captured,
    )


def _watched(setting: Setting, attention: Any) -> EvictingCache:
    """Return a cache that holds as much as it may, but for some steps until the first cut."""
    import torch

    from spectralkv.hf import EvictingCache

    if setting.policy is None:
        raise ValueError("[bench] expected a policy, got None")
    model = setting.model
    cache = EvictingCache(model.config, setting.policy, attention=attention)
    # Slabs that grow while they are filled would leave torch with what nothing fits into.
    _, heads, dim = _heads(model.config.get_text_config(decoder=True))
    nothing = torch.empty(setting.batch, heads, 0, dim, dtype=model.dtype, device=model.device)
    for layer in cache.evicting_layers:
        layer.lazy_initialization(nothing, nothing)
        layer.start_steps(1)
        layer.end_steps(is_whole=True)
    if setting.head_budgets:  # the first cut, behind the filling, divides the layers
        count = max(map(max, setting.head_budgets)) + setting.interval
        fill(model, cache, batch=setting.batch, count=count, chunk=count)
        return cache
    cuts_at = setting.budget + setting.interval
    count = max(1, cuts_at - min(_STEPS_BEFORE_CUT, setting.interval))
    fill(model, cache, batch=setting.batch, count=count, chunk=setting.chunk)
    return cache


# -- rivals


def _quantized_backends() -> tuple[list[str], list[str]]:
    from transformers import cache_utils

    backends = ["fp8"] if hasattr(cache_utils, "Fp8QuantizedLayer") else []
    for backend, module in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        if _is_installed(module):
            return [*backends, backend], []
    note = (
        "left out: QuantizedCache in 4 bits, whose backends are missing "
        "(pip install optimum-quanto, or hqq)"
    )
    return backends, [note]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


@contextmanager
def _quantized(setting: Setting, *, backend: str) -> Iterator[Subject]:
    from transformers import QuantizedCache

    cache = QuantizedCache(backend, setting.model.config)
    fill(setting.model, cache, batch=setting.batch, count=setting.context)
    yield Subject(cache=cache, run=_eager(setting, cache))


@contextmanager
def _pressed(setting: Setting, *, press: str) -> Iterator[Subject]:
    try:
        from kvpress import DecodingPress, KnormPress, SnapKVPress
    except ImportError as error:
        raise EvaluationError(f"kvpress cannot be imported: {error}") from error
    from transformers import DynamicCache

    # What SnapKV looks at must be shorter than what is buffered between two cuts.
    scorers = {
        "Knorm": KnormPress,
        "SnapKV": partial(SnapKVPress, window_size=max(1, setting.interval // 2)),
    }
    cache = DynamicCache(config=setting.model.config)
    fill(setting.model, cache, batch=setting.batch, count=setting.budget)
    decoding = DecodingPress(
        base_press=scorers[press](),
        compression_interval=setting.interval,
        target_size=setting.budget,
        hidden_states_buffer_size=setting.interval,
    )
    with decoding(setting.model):
        run = _eager(setting, cache, names_positions=True)
        yield Subject(cache=cache, run=run, period=setting.interval)


# -- what they share


def _heads(config: Any) -> tuple[int, int, int]:
    """Return query heads, KV heads and their dimensions."""
    query_heads = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    return query_heads, heads, dim


def _no_attention(
    module: Any,  # noqa: ARG001
    query: torch.Tensor,
    *args: Any,  # noqa: ARG001
    **kwargs: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, None]:
    return query, None


def _eager(
    setting: Setting, cache: Any, *, names_positions: bool = False, compiled: str = ""
) -> Callable[[int], None]:
    """Return the plain loop: the model is called step by step, and the likeliest token taken.

    Presses want to be told positions. `compiled`: the backend by which the model is compiled.
    """
    import torch

    from spectralkv.hf import cache_argument

    model = setting.model
    ids = torch.zeros(setting.batch, 1, dtype=torch.long, device=model.device)
    step = torch.compile(model, dynamic=False, backend=compiled) if compiled else model
    position = torch.full((1,), setting.context, device=model.device)

    def run(count: int) -> None:
        options: dict[str, Any] = {}
        if names_positions:
            options = {"position_ids": position[None], "cache_position": position}
        for _ in range(count):
            logits = step(input_ids=ids, **cache_argument(cache), use_cache=True, **options).logits
            ids.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)

    return run


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value, those that make up a quantized one included."""
    import torch

    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from _tensors([getattr(value, name) for name in names])
        else:
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
