"""How a transformers model turns its keys by their positions."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig

from spectralkv.config import Rotary

# Kinds whose frequencies do not change with the length of the text.
_STEADY = ("default", "linear", "yarn", "llama3", "proportional")


def rotary_of(config: PreTrainedConfig, layer: int) -> Rotary | None:
    """Return the rotary embedding of a layer's keys.

    Parameters
    ----------
    config : PreTrainedConfig
        Configuration of the text model.
    layer : int
        Index of the layer.

    Returns
    -------
    Rotary or None
        None: the layer has none, or one that is not known to be the same for all tokens.

    Notes
    -----
    Frequencies and pairs are those of the model's own code: its module's only ``RotaryEmbedding``
    and ``rotate_half``.
    """
    module = _modeling(config)
    if module is None or not _turns_keys(config, layer):
        return None
    pairs = getattr(module, "rotate_half", None)
    kinds = [
        value
        for name, value in vars(module).items()
        if name.endswith("RotaryEmbedding")
        and "Vision" not in name
        and getattr(value, "__module__", None) == module.__name__
    ]
    if pairs is None or len(kinds) != 1:
        return None
    turned = pairs(torch.arange(4.0)).tolist()
    interleaved = {(-2.0, -3.0, 0.0, 1.0): False, (-1.0, 0.0, -3.0, 2.0): True}.get(tuple(turned))
    if interleaved is None:
        return None
    with torch.device("cpu"):
        embedding = kinds[0](config=config)
    types = getattr(config, "layer_types", None)
    own = f"{types[layer]}_inv_freq" if types else "inv_freq"
    inv_freq = getattr(embedding, own, getattr(embedding, "inv_freq", None))
    kind = getattr(embedding, "rope_type", None)
    if isinstance(kind, dict):
        kind = kind.get(types[layer]) if types else None
    if inv_freq is None or kind not in _STEADY:
        return None
    frequencies = tuple(float(frequency) for frequency in inv_freq.flatten())
    return Rotary(inv_freq=frequencies, interleaved=interleaved)


def _modeling(config: PreTrainedConfig) -> ModuleType | None:
    """Return the module of the model's code."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _turns_keys(config: Any, layer: int) -> bool:
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "mrope_section" in parameters or hasattr(config, "qk_rope_head_dim"):
        return False  # several axes, or keys of which a part lies elsewhere
    layers = getattr(config, "no_rope_layers", None)  # 0 marks those without
    if layers and not layers[layer]:
        return False
    types = getattr(config, "layer_types", None)
    return not (config.model_type == "cohere2" and types and types[layer] == "full_attention")
