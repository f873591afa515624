"""The whole attention of a model over a text, on disk: a run that sees everything.

A pass with the full cache is watched at the place where eviction policies watch, behind the rotary
embedding. Of each layer the attention of each group of query heads, those that share a KV head, is
averaged, rounded to float16 and written while the pass goes on. So memory holds the rows of one
layer and one chunk at a time, whatever the length.

A capture is a folder:

``layer-007-rows-00512.safetensors``
    ``attention``, float16 (Hkv, Q, S): what the Q tokens from position 512 on pay to the
    S = 512 + Q tokens up to the last of them; 0 where a token does not look. One file a layer and
    chunk; together they hold little more than the causal half of the square.
``capture.json``
    What was captured; written last, so that a folder without it is an unfinished one.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError, MissingDependencyError
from spectralkv.evaluation.report import make_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MANIFEST = "capture.json"
_PART = re.compile(r"layer-\d{3,}-rows-\d{5,}\.safetensors")
_BYTES = 2  # float16
#: Part of the disk that is left alone.
_SPARE = 0.02
#: Positions that fit below 15 bits of attention in 31 bits; see `spectralkv.evaluation.oracle`.
MOST_TOKENS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """What a capture will hold, known before it starts.

    Attributes
    ----------
    layers : tuple of int
        Layers of the model whose tokens can be evicted.
    heads : int
        KV heads, each with its group of query heads.
    tokens : int
        Tokens that are fed.
    ends : tuple of int
        Where each chunk ends.
    """

    layers: tuple[int, ...]
    heads: int
    tokens: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, *, boundary: int, tokens: int, chunk: int) -> CapturePlan:
        """Plan a capture.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            A causal language model.
        boundary : int
            A chunk ends here, so that what a cache holds at this point can be looked at.
        tokens : int
            Tokens to feed.
        chunk : int
            Most tokens fed at a time.

        Raises
        ------
        EvaluationError
            The numbers do not fit together, or no layer of the model can evict.
        """
        if chunk < 1 or not 0 < boundary <= tokens:
            raise EvaluationError(
                f"a capture needs chunk >= 1 and 0 < boundary <= tokens, got {chunk}, {boundary} "
                f"and {tokens}"
            )
        if tokens > MOST_TOKENS:
            raise EvaluationError(
                f"a capture holds at most {MOST_TOKENS:,} tokens, got {tokens:,}: its size grows "
                "with their square"
            )
        layers = tuple(layer.index for layer in _full_cache(model, _nowhere).evicting_layers)
        if not layers:
            raise EvaluationError(
                "no layer of this model holds all tokens: there is nothing to evict"
            )
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        ends = [*range(chunk, boundary, chunk), boundary]
        ends += [*range(boundary + chunk, tokens, chunk), tokens] if tokens > boundary else []
        return cls(layers=layers, heads=int(heads), tokens=tokens, ends=tuple(ends))

    @property
    def nbytes(self) -> int:
        """Bytes of the attention on disk."""
        starts = (0, *self.ends[:-1])
        elements = sum((end - start) * end for start, end in zip(starts, self.ends, strict=True))
        return len(self.layers) * self.heads * elements * _BYTES

    def check_space(self, folder: Path, captures: int = 1) -> None:
        """Refuse what the disk has no room for.

        Parameters
        ----------
        folder : pathlib.Path
            Where the captures will lie; it need not exist.
        captures : int
            How many of this size.

        Raises
        ------
        EvaluationError
            Names what is needed and what is free.
        """
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        disk = shutil.disk_usage(place)
        needed, free = captures * self.nbytes, disk.free - int(_SPARE * disk.total)
        if needed > free:
            raise EvaluationError(
                f"{folder}: the attention of {len(self.layers)} layers x {self.heads} heads over "
                f"{self.tokens:,} tokens takes {needed / 2**30:.2f} GiB"
                f"{'' if captures == 1 else f' for {captures} sequences'}, the disk has "
                f"{max(free, 0) / 2**30:.2f} GiB to spare: take a shorter text, or another folder"
            )


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass with the full cache leaves in memory.

    Attributes
    ----------
    cache : spectralkv.hf.EvictingCache
        It has seen all tokens and holds them all.
    others : dict of int to object
        Copies, as of `boundary`, of those layers' caches that never evict (sliding windows).
    nll : torch.Tensor
        float32 (tokens - 1,): nats of tokens 1 .. tokens - 1, on the model's device.
    """

    cache: Any
    others: dict[int, Any]
    nll: Any


class Capture:
    """A finished capture.

    Parameters
    ----------
    folder : pathlib.Path
        The folder.

    Raises
    ------
    EvaluationError
        The folder holds no finished capture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            self.config: dict[str, Any] = manifest["config"]
            self.layers = tuple(int(layer) for layer in manifest["layers"])
            self.heads, self.tokens = int(manifest["heads"]), int(manifest["tokens"])
            self._ends = tuple(int(end) for end in manifest["ends"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{folder}: expected a finished capture with {_MANIFEST}, got {error}"
            ) from None

    @classmethod
    def find(cls, folder: Path, config: dict[str, Any], plan: CapturePlan) -> Capture | None:
        """Return the finished capture of this very configuration in a folder, if there is one."""
        if not (folder / _MANIFEST).is_file():
            return None
        capture = cls(folder)
        same = (
            capture.config == json.loads(json.dumps(config))
            and capture.layers == plan.layers
            and (capture.heads, capture.tokens, capture._ends)
            == (plan.heads, plan.tokens, plan.ends)
        )
        return capture if same and all(map(Path.is_file, capture.files())) else None

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files())

    def files(self) -> list[Path]:
        """Return the files of all layers and chunks."""
        starts = (0, *self._ends[:-1])
        return [_part(self.folder, layer, start) for layer in self.layers for start in starts]

    def layer(self, index: int, *, device: str = "cpu") -> Any:
        """Read the attention of a layer.

        Parameters
        ----------
        index : int
            Index of the layer in the model.
        device : str
            Where it is to lie.

        Returns
        -------
        torch.Tensor
            float16 (Hkv, tokens, tokens), row t what token t paid; 0 above the diagonal.

        Raises
        ------
        EvaluationError
            The layer was not captured, or a file does not hold what the manifest says.
        """
        import torch

        open_file = _safetensors().safe_open
        if index not in self.layers:
            raise EvaluationError(
                f"{self.folder}: layer {index} was not captured, layers {_spans(self.layers)} were"
            )
        shape = (self.heads, self.tokens, self.tokens)
        attention = torch.zeros(shape, dtype=torch.float16, device=device)
        for start, end in zip((0, *self._ends[:-1]), self._ends, strict=True):
            path = _part(self.folder, index, start)
            try:
                with open_file(str(path), framework="pt", device=device) as part:
                    rows = part.get_tensor("attention")
            except Exception as error:  # the library raises its own type, OSError and KeyError
                raise EvaluationError(f"{path}: cannot be read ({error})") from None
            if tuple(rows.shape) != (self.heads, end - start, end):
                raise EvaluationError(
                    f"{path}: attention must be ({self.heads}, {end - start}, {end}), "
                    f"got {tuple(rows.shape)}"
                )
            attention[:, start:end, :end] = rows
        return attention


def capture_attention(
    model: Any,
    token_ids: Sequence[int],
    folder: Path,
    *,
    plan: CapturePlan,
    boundary: int,
    config: dict[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> Pass:
    """Feed a text through the full cache and write all of its attention.

    A finished capture of the same `config` in `folder` is left as it is, and the pass is made
    without watching; any other capture there is replaced.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    token_ids : sequence of int
        ``plan.tokens`` ids, or one more, whose likelihood is then known as well.
    folder : pathlib.Path
        Where the files go; it is made.
    plan : CapturePlan
        What will be captured.
    boundary : int
        Position at which caches that never evict are copied; a chunk must end there.
    config : dict
        What decides the attention, plain values. Kept in the manifest.
    on_progress : callable, optional
        Called with (tokens fed, tokens) after each pass.

    Returns
    -------
    Pass
        Keys and values of all tokens, and their likelihoods.

    Raises
    ------
    EvaluationError
        The plan does not fit the tokens, the disk lacks the space, or a file cannot be written.
    MissingDependencyError
        safetensors is not installed.
    """
    import copy

    import torch

    from spectralkv.hf import EvictingLayer, cache_argument

    if not plan.tokens <= len(token_ids) <= plan.tokens + 1 or boundary not in plan.ends:
        raise EvaluationError(
            f"a capture of {plan.tokens} tokens with a chunk's end at {boundary} needs as many "
            f"tokens or one more, got {len(token_ids)} and chunks that end at {plan.ends}"
        )
    is_there = Capture.find(folder, config, plan) is not None
    write = None
    if not is_there:
        _clear(folder)
        plan.check_space(folder)
        write = _writer(make_folder(folder), plan)
    cache = _full_cache(model, write)
    ids = torch.tensor([list(token_ids)], dtype=torch.long, device=model.device)
    others: dict[int, Any] = {}
    nll = []
    with torch.no_grad():
        for start, end in zip((0, *plan.ends[:-1]), plan.ends, strict=True):
            out = model(input_ids=ids[:, start:end], **cache_argument(cache), use_cache=True)
            targets = ids[0, start + 1 : end + 1]
            logits = out.logits[0, : targets.shape[0]].float()
            nll.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            if end == boundary:
                others = {
                    index: copy.deepcopy(layer)
                    for index, layer in enumerate(cache.layers)
                    if not isinstance(layer, EvictingLayer)
                }
            if on_progress is not None:
                on_progress(end, plan.tokens)
    if not is_there:
        write_json(
            folder / _MANIFEST,
            {
                "config": config,
                "layers": list(plan.layers),
                "heads": plan.heads,
                "tokens": plan.tokens,
                "ends": list(plan.ends),
                "dtype": "float16",
            },
        )
    return Pass(cache=cache, others=others, nll=torch.cat(nll))


def _nowhere(order: int, rows: Any) -> None:
    """Stand in for a writer where a cache is only asked whether it can be watched."""


def _full_cache(model: Any, write: Callable[[int, Any], None] | None = None) -> Any:
    from spectralkv.evaluation.oracle_caches import full_cache

    try:
        return full_cache(model.config, write)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def _writer(folder: Path, plan: CapturePlan) -> Callable[[int, Any], None]:
    save = _safetensors("torch").save_file

    def write(order: int, rows: Any) -> None:
        start = rows.shape[2] - rows.shape[1]
        path = _part(folder, plan.layers[order], start)
        partial = path.with_name(path.name + ".tmp")
        try:
            save({"attention": rows}, str(partial))
            partial.replace(path)
        except Exception as error:  # the library wraps a full disk into its own type
            partial.unlink(missing_ok=True)
            raise EvaluationError(f"{path}: cannot be written ({error})") from error

    return write


def _clear(folder: Path) -> None:
    """Delete an earlier capture, the manifest first; nothing else in the folder is touched."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("layer-*.safetensors"):
        if _PART.fullmatch(path.name):
            path.unlink()


def _part(folder: Path, layer: int, start: int) -> Path:
    return folder / f"layer-{layer:03d}-rows-{start:05d}.safetensors"


def _safetensors(module: str = "") -> Any:
    import importlib

    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "safetensors is not installed: pip install 'spectralkv[evaluate]'"
        ) from None


def _spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers for a reader: ``"0-3, 7"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
