"""A cache in a file: a long conversation that goes on another day."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from spectralkv import __version__
from spectralkv.hf.layer import EvictingLayer
from spectralkv.policies.base import Policy
from spectralkv.policies.plain import from_dict, to_dict

_FORMAT = "spectralkv cache"
_VERSION = 1
# What of a model's configuration decides whether keys and values can be its own.
_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "layer_types",
    "sliding_window",
    "rope_parameters",
)


def write(
    path: str | os.PathLike[str], config: PreTrainedConfig, policy: Policy, layers: list[Any]
) -> None:
    """Write layers, and what they belong to, to one safetensors file.

    Raises
    ------
    TypeError
        A layer or its policy cannot be saved.
    RuntimeError
        A forward pass is under way.
    """
    tensors: dict[str, torch.Tensor] = {}
    states = []
    for index, layer in enumerate(layers):
        own, numbers = _state_of(index, layer)
        states.append(numbers)
        tensors.update({f"{index}.{name}": tensor.contiguous() for name, tensor in own.items()})
    head = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "spectralkv": __version__,
        "model": _model_of(config),
        "policy": to_dict(policy),
        "layers": states,
    }
    # A save that fails half way leaves the one before it.
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    save_file(tensors, partial, metadata={"spectralkv": json.dumps(head)})
    partial.replace(target)


class SavedCache:
    """A file that :func:`write` wrote.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no saved cache, or one of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"[load] there is no file {self._path}")
        try:
            with safetensors.safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise self._wrong("a safetensors file", str(error)) from None
        self._head: dict[str, Any] = json.loads(metadata.get("spectralkv", "{}"))
        if self._head.get("format") != _FORMAT:
            raise self._wrong("a cache that EvictingCache.save wrote", "another safetensors file")
        if self._head["format_version"] != _VERSION:
            raise self._wrong(
                f"of format version {_VERSION}",
                f"version {self._head['format_version']} of spectralkv {self._head['spectralkv']}",
            )

    def policy(self, given: Policy | None) -> Policy:
        """Return the policy of the cache, which must be `given` where that is not None.

        Raises
        ------
        ValueError
            It is another one, or an own one and nothing is given.
        """
        saved = self._head["policy"]
        if given is None:
            return from_dict(saved)
        offered = json.loads(json.dumps(to_dict(given)))
        if offered["name"] != saved["name"]:
            raise ValueError(
                f"[load] policy must be {saved['name']} as in {self._path}, got {given.name}"
            )
        self._compare(f"{given.name}'s", saved["options"], offered["options"])
        return given

    def check_model(self, config: PreTrainedConfig) -> None:
        """Refuse a model whose keys and values these cannot be.

        Raises
        ------
        ValueError
            Names what differs.
        """
        self._compare("the model's", self._head["model"], _model_of(config))

    def read_into(self, layers: list[Any], devices: Sequence[str | torch.device]) -> None:
        """Bring fresh layers to where the saved ones were, each on its device."""
        states = self._head["layers"]
        with safetensors.safe_open(self._path, framework="pt") as file:
            names = list(file.keys())
            each = zip(layers, states, devices, strict=True)
            for index, (layer, numbers, device) in enumerate(each):
                prefix = f"{index}."
                tensors = {
                    name.removeprefix(prefix): file.get_tensor(name).to(device)
                    for name in names
                    if name.startswith(prefix)
                }
                _load_state(layer, tensors, numbers)

    def _wrong(self, expected: str, got: str) -> ValueError:
        return ValueError(f"[load] {self._path} must be {expected}, got {got}")

    def _compare(self, whose: str, saved: Mapping[str, Any], offered: Mapping[str, Any]) -> None:
        for name in {**saved, **offered}:
            expected, got = saved.get(name), offered.get(name)
            if expected != got:
                raise ValueError(
                    f"[load] {whose} {name} must be {expected!r} as in {self._path}, got {got!r}"
                )


def _model_of(config: PreTrainedConfig) -> dict[str, Any]:
    fields = {name: getattr(config, name, None) for name in _FIELDS}
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def _state_of(index: int, layer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if isinstance(layer, EvictingLayer):
        return layer.state_dict()
    if type(layer) is not DynamicSlidingWindowLayer:
        raise TypeError(
            "[save] layers must be attention with or without a sliding window, got "
            f"{type(layer).__name__} in layer {index}"
        )
    if layer.keys is None or layer.values is None:
        return {}, {}
    return {"keys": layer.keys, "values": layer.values}, {"seen": layer.cumulative_length}


def _load_state(layer: Any, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    if isinstance(layer, EvictingLayer):
        layer.load_state_dict(tensors, numbers)
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        layer.cumulative_length = numbers["seen"]
