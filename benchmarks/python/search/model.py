"""A decoder of Llama's kind, written out: projections, rotation, norms and nothing hidden."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from spectralkv.evaluation import EvaluationError

#: Model types whose layers are built as below; `Decoder.check` looks whether one really is.
FAMILIES = ("llama", "mistral", "qwen2")

# Largest difference of a logit from that of transformers, as a share of the largest logit.
_TOLERANCE = 1e-3


class Linear(NamedTuple):
    """A linear map."""

    weight: torch.Tensor
    """(out, in)."""
    bias: torch.Tensor | None
    """(out,) or None."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """The weights of a layer."""

    before_attention: torch.Tensor
    before_mlp: torch.Tensor
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear


class Decoder:
    """The weights of a transformers model, and the few functions that a forward pass needs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model of one of the `FAMILIES`, without a sliding window. Its weights are
        shared where they are float32 (or float64) already, else copied.

    Raises
    ------
    EvaluationError
        The model is of another kind.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        if config.model_type not in FAMILIES:
            raise EvaluationError(
                f"the search needs a model of type {', '.join(FAMILIES)}, got {config.model_type!r}"
            )
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        if getattr(config, "sliding_window", None) is not None and kinds != {"full_attention"}:
            raise EvaluationError("the search needs a model without a sliding window")
        body = model.model
        self._reference = model
        self.device = body.embed_tokens.weight.device
        dtype = torch.promote_types(body.embed_tokens.weight.dtype, torch.float32)
        self.dtype = dtype

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(dtype)

        def linear(module: Any) -> Linear:
            return Linear(take(module.weight), None if module.bias is None else take(module.bias))

        self.embedding = take(body.embed_tokens.weight)
        self.last_norm = take(body.norm.weight)
        self.head = linear(model.lm_head)
        self.layers = [
            Layer(
                before_attention=take(layer.input_layernorm.weight),
                before_mlp=take(layer.post_attention_layernorm.weight),
                query=linear(layer.self_attn.q_proj),
                key=linear(layer.self_attn.k_proj),
                value=linear(layer.self_attn.v_proj),
                output=linear(layer.self_attn.o_proj),
                gate=linear(layer.mlp.gate_proj),
                up=linear(layer.mlp.up_proj),
                down=linear(layer.mlp.down_proj),
            )
            for layer in body.layers
        ]
        self.num_layers = len(self.layers)
        self.query_heads = config.num_attention_heads
        self.heads = config.num_key_value_heads
        self.group = self.query_heads // self.heads
        self.head_dim = self.layers[0].key.weight.shape[0] // self.heads
        self.scaling = 1.0 / math.sqrt(self.head_dim)
        self._eps = config.rms_norm_eps
        # Of the rotary embedding itself: it knows the stretched kinds, too.
        self._frequency = body.rotary_emb.inv_freq.to(self.device, dtype)
        self._amplitude = float(body.rotary_emb.attention_scaling)
        eos = getattr(model.generation_config or config, "eos_token_id", None)
        ends = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
        #: Tokens that end an answer.
        self.ends = torch.tensor(ends, dtype=torch.long, device=self.device)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the root-mean-square norm."""
        return functional.rms_norm(x, (x.shape[-1],), weight, self._eps)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (..., D / 2) of positions (...)."""
        angle = positions[..., None].to(self.dtype) * self._frequency
        return angle.cos() * self._amplitude, angle.sin() * self._amplitude

    def rotate(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], *, back: bool = False
    ) -> torch.Tensor:
        """Rotate x (..., D) by angles that broadcast with (..., D / 2), or back."""
        cosine, sine = angles
        if back:
            cosine, sine = cosine / self._amplitude**2, -sine / self._amplitude**2
        first, second = x.chunk(2, -1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits of hidden states after the last layer, before the last norm."""
        return self.head(self.norm(hidden, self.last_norm))

    @torch.inference_mode()
    def check(self, logits: torch.Tensor, ids: torch.Tensor) -> float:
        """Compare logits (B, N, V) of ids (B, N) with those of transformers.

        Returns
        -------
        float
            The largest difference as a share of the largest logit.

        Raises
        ------
        EvaluationError
            They differ: the model is not what this module takes it for.
        """
        expected = self._reference(input_ids=ids, use_cache=False).logits.to(logits.dtype)
        worst = float((logits - expected).abs().max() / expected.abs().max())
        if not worst < _TOLERANCE:
            raise EvaluationError(
                f"the simulated forward pass must agree with transformers up to {_TOLERANCE:g} of "
                f"the largest logit, got {worst:.3g}: load the model in float32, or it has "
                "something that the simulation lacks"
            )
        return worst
