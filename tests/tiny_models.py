"""Models of the families users load, small enough to run in milliseconds, with random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

VOCABULARY = 97
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # sharp attention: policies then have something to choose by
}


def make_config(family: str, **overrides: Any) -> Any:
    sizes = _SIZES | overrides
    if family == "llama":
        return transformers.LlamaConfig(**sizes)
    if family == "mistral":
        return transformers.MistralConfig(**{"sliding_window": None, **sizes})
    if family == "qwen2":
        return transformers.Qwen2Config(**sizes)
    if family == "qwen3":
        return transformers.Qwen3Config(**{"head_dim": 12, **sizes})
    if family == "gemma2":
        layers = ["sliding_attention", "full_attention"]
        return transformers.Gemma2Config(
            **{"head_dim": 8, "sliding_window": 24, "layer_types": layers, **sizes}
        )
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        sizes["num_hidden_layers"] = overrides.get("num_hidden_layers", 3)
        return transformers.Gemma3TextConfig(
            **{"head_dim": 8, "sliding_window": 24, "layer_types": layers, **sizes}
        )
    if family == "phi3":
        return transformers.Phi3Config(**{"sliding_window": None, **sizes})
    raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")


@functools.cache
def make_model(
    family: str = "llama",
    implementation: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
    **overrides: Any,
) -> Any:
    """Return a model; the same arguments give the same object."""
    config = make_config(family, **overrides)
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


def implementations(family: str) -> tuple[str, ...]:
    # sdpa knows no softcap.
    return ("eager",) if family == "gemma2" else ("sdpa", "eager")


def random_ids(batch: int, length: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator).to(device)
