"""Caches for Hugging Face transformers, and a lean loop that decodes with them."""

from __future__ import annotations

from spectralkv.hf.cache import CacheStats, EvictingCache, SpectralCache
from spectralkv.hf.decoding import DecodeLoop, Sampling, decode, generate
from spectralkv.hf.layer import EvictingLayer, EvictionEvent
from spectralkv.hf.naming import cache_argument
from spectralkv.hf.streams import one_stream

__all__ = [
    "CacheStats",
    "DecodeLoop",
    "EvictingCache",
    "EvictingLayer",
    "EvictionEvent",
    "Sampling",
    "SpectralCache",
    "cache_argument",
    "decode",
    "generate",
    "one_stream",
]
