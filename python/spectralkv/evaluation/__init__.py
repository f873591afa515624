"""Measure what eviction costs: streaming perplexity, generation, heat maps.

Importing this package imports neither torch nor transformers; the functions that need them do.
"""

from __future__ import annotations

from spectralkv.evaluation.caches import CacheSettings, create_cache, create_policy
from spectralkv.evaluation.datasets import demo_text, read_text, token_sequences
from spectralkv.evaluation.demo import DemoConfig, DemoResult, run_demo, write_demo
from spectralkv.evaluation.errors import EvaluationError, MissingDependencyError
from spectralkv.evaluation.generation import Generation, Sampling, generate
from spectralkv.evaluation.heatmap import EvictionRecorder, HeatMap
from spectralkv.evaluation.inspection import inspect_tokens
from spectralkv.evaluation.models import LoadedModel, load_demo_model, load_model
from spectralkv.evaluation.perplexity import PerplexityResult, evaluate_perplexity, stream
from spectralkv.evaluation.specs import Budget, PolicySpec
from spectralkv.evaluation.statistics import PairedDifference, paired_difference

__all__ = [
    "Budget",
    "CacheSettings",
    "DemoConfig",
    "DemoResult",
    "EvaluationError",
    "EvictionRecorder",
    "Generation",
    "HeatMap",
    "LoadedModel",
    "MissingDependencyError",
    "PairedDifference",
    "PerplexityResult",
    "PolicySpec",
    "Sampling",
    "create_cache",
    "create_policy",
    "demo_text",
    "evaluate_perplexity",
    "generate",
    "inspect_tokens",
    "load_demo_model",
    "load_model",
    "paired_difference",
    "read_text",
    "run_demo",
    "stream",
    "token_sequences",
    "write_demo",
]
