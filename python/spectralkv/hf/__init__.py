"""Caches for Hugging Face transformers."""

from __future__ import annotations

from spectralkv.hf.cache import CacheStats, EvictingCache, SpectralCache
from spectralkv.hf.layer import EvictingLayer, EvictionEvent

__all__ = ["CacheStats", "EvictingCache", "EvictingLayer", "EvictionEvent", "SpectralCache"]
