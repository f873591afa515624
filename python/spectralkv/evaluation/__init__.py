"""Measure what eviction costs: streaming perplexity, generation, heat maps.

Importing this package imports neither torch nor transformers; the functions that need them do.
"""

from __future__ import annotations

from spectralkv.evaluation.caches import CacheSettings, create_cache, create_policy
from spectralkv.evaluation.datasets import (
    Corpus,
    demo_text,
    essays,
    read_corpora,
    read_text,
    token_sequences,
)
from spectralkv.evaluation.demo import DemoConfig, DemoResult, run_demo, write_demo
from spectralkv.evaluation.errors import EvaluationError, MissingDependencyError
from spectralkv.evaluation.generation import Generation, Sampling, generate
from spectralkv.evaluation.heatmap import EvictionRecorder, HeatMap
from spectralkv.evaluation.inspection import inspect_tokens
from spectralkv.evaluation.models import LoadedModel, load_demo_model, load_model
from spectralkv.evaluation.perplexity import PerplexityResult, evaluate_perplexity, stream
from spectralkv.evaluation.runs import RunDocument, RunFile, load_runs
from spectralkv.evaluation.specs import Budget, PolicySpec
from spectralkv.evaluation.statistics import (
    ExcessRatio,
    PairedDifference,
    excess_ratio,
    paired_difference,
)

__all__ = [
    "Budget",
    "CacheSettings",
    "Corpus",
    "DemoConfig",
    "DemoResult",
    "EvaluationError",
    "EvictionRecorder",
    "ExcessRatio",
    "Generation",
    "HeatMap",
    "LoadedModel",
    "MissingDependencyError",
    "PairedDifference",
    "PerplexityResult",
    "PolicySpec",
    "RunDocument",
    "RunFile",
    "Sampling",
    "create_cache",
    "create_policy",
    "demo_text",
    "essays",
    "evaluate_perplexity",
    "excess_ratio",
    "generate",
    "inspect_tokens",
    "load_demo_model",
    "load_model",
    "load_runs",
    "paired_difference",
    "read_corpora",
    "read_text",
    "run_demo",
    "stream",
    "token_sequences",
    "write_demo",
]
