"""Files that an evaluation leaves behind: JSON with where it was run, and the HTML heat map."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spectralkv.evaluation.heatmap import HeatMap

_PACKAGES = ("torch", "transformers", "numpy", "gguf")


def environment(device: str, dtype: str | None = None) -> dict[str, Any]:
    """Describe where a figure comes from.

    Parameters
    ----------
    device : str
        The torch device that was used.
    dtype : str, optional
        Type of the model's weights.

    Returns
    -------
    dict
        ``spectralkv``, ``commit`` (None outside a checkout) and ``uncommitted_changes``,
        ``python``, ``packages``, ``device``, ``device_name``, ``dtype``, ``threads``, and on CUDA
        ``cuda_driver``.
    """
    import torch

    import spectralkv

    on_cuda = torch.device(device).type == "cuda"
    commit, dirty = _commit()
    facts = {
        "spectralkv": spectralkv.__version__,
        "commit": commit,
        "uncommitted_changes": dirty,
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else processor_name(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    return facts | ({"cuda_driver": cuda_driver()} if on_cuda else {})


def package_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Return the installed version of each package, None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def device_name(device: str) -> str:
    """Return what a torch device is called: ``"cuda:0, NVIDIA H200"``."""
    import torch

    if torch.device(device).type != "cuda":
        return device
    return f"{device}, {torch.cuda.get_device_name(device)}"


def cuda_driver() -> str:
    """Return the release of NVIDIA's driver and the newest CUDA it supports; "" without one."""
    import spectralkv

    supported = spectralkv.cuda_driver_version()
    if supported == 0:
        return ""
    release = ""
    with contextlib.suppress(OSError):
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ..."
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
        release = found.group() + ", " if found else ""
    return f"{release}CUDA {supported // 1000}.{supported % 1000 // 10}"


def processor_name() -> str:
    """Return the name of the processor and its number of logical cores."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} logical cores"


def size(count: int) -> str:
    """Return bytes for a reader: ``"45.0 MiB"``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; NaN and infinity become null, since JSON has neither.

    Parameters
    ----------
    path : pathlib.Path
        The file; its folder is made.
    content : mapping
        Plain values.

    Raises
    ------
    EvaluationError
        The file cannot be written.
    """
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, making its folder.

    A reader, and a crash, finds the old file or the new one whole.

    Raises
    ------
    EvaluationError
        The file cannot be written.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise EvaluationError(f"{path}: cannot be written ({error.strerror})") from None


def make_folder(path: Path) -> Path:
    """Make a folder and those above it.

    Raises
    ------
    EvaluationError
        It cannot be made, or there is a file of that name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be made a folder ({error.strerror})") from None
    return path


def heat_map_html(heat: HeatMap, *, title: str, model: str) -> str:
    """Render the text with every token tinted by its standing, layer by layer.

    Parameters
    ----------
    heat : HeatMap
        What was recorded.
    title : str
        Heading of the page.
    model : str
        Name of the model.

    Returns
    -------
    str
        One self-contained HTML page; all text in it is escaped.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    """
    import numpy as np

    try:
        import jinja2
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "jinja2 is not installed: pip install 'spectralkv[cli]'"
        ) from None
    judged = np.isfinite(heat.standing)
    known = judged.any(axis=0)
    count = np.maximum(judged.sum(axis=0), 1)
    mean = np.where(known, np.where(judged, heat.standing, 0.0).sum(axis=0) / count, np.nan)
    kept = heat.kept.mean(axis=0)
    data: dict[str, list[list[Any]]] = {
        "standing": [_per_cent(row) for row in (mean, *heat.standing)],
        "kept": [[math.ceil(100 * x) for x in row] for row in (kept, *heat.kept)],
        "score": [[None] * heat.tokens, *([_short(x) for x in row] for row in heat.score)],
        "gone": [[0] * heat.tokens, *([int(x) for x in row] for row in heat.evicted_at)],
    }
    loader = jinja2.PackageLoader("spectralkv.evaluation", "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return pages.get_template("heatmap.html.j2").render(
        title=title,
        model=model,
        heat=heat,
        data=data,
        kept_anywhere=int((kept > 0).sum()),
        kept_share=float(heat.kept.mean()),
    )


def _per_cent(row: Any) -> list[int | None]:
    return [round(float(x) * 100) if math.isfinite(x) else None for x in row]


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that the package, or the user, is in, and if it is dirty.

    A package in some other project's virtual environment is not that project's commit: git must
    track the package's own source.
    """
    package = Path(__file__).resolve().parent.parent
    places = ((package, "__init__.py"), (Path.cwd(), "python/spectralkv/__init__.py"))
    for folder, tracked in places:
        if _git(folder, "ls-files", "--error-unmatch", tracked) is not None:
            commit = _git(folder, "rev-parse", "HEAD")
            if commit:
                return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    return None, None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
