"""The model ``spectralkv`` of EleutherAI's lm-evaluation-harness.

``pip install 'spectralkv[lm-eval]'``, then ``python -m spectralkv.lm_eval --model spectralkv
--tasks gsm8k --model_args pretrained=my-model,policy=spectral,budget=512``: the harness's own
command line, which knows the model here.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from spectralkv import policies
from spectralkv.hf import EvictingCache, cache_argument

__all__ = ["SpectralLM"]


@register_model("spectralkv")
class SpectralLM(HFLM):  # type: ignore[misc]
    """An ``hf`` model that generates in an evicting cache, a new one for each batch.

    Parameters
    ----------
    policy : str
        Name of the policy, see :func:`spectralkv.policies.available`.
    **options
        Options of the policy, `budget` among them; all others are those of ``hf``.

    Raises
    ------
    ValueError
        An option of the policy is wrong. A task wants likelihoods: these take one forward pass, in
        which no cache has let anything go yet, so that they are the model's own.
    """

    def __init__(self, pretrained: Any, *, policy: str = "spectral", **options: Any) -> None:
        known = policies.options_of(policy)
        own = {name: options.pop(name) for name in list(options) if name in known}
        self._policy = policies.create(policy, **own)
        super().__init__(pretrained, **options)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        cache = EvictingCache(self.model.config, self._policy)
        generated: torch.Tensor = super()._model_generate(
            context, max_length, stop, **cache_argument(cache), **generation_kwargs
        )
        return generated

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:  # noqa: ARG002
        """Refuse: see the class."""
        raise self._no_likelihoods()

    def loglikelihood_rolling(
        self,
        requests: list[Instance],  # noqa: ARG002
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> Any:
        """Refuse: see the class."""
        raise self._no_likelihoods()

    @staticmethod
    def _no_likelihoods() -> ValueError:
        return ValueError(
            "[lm_eval] tasks of model spectralkv must be generate_until, got one of likelihoods: "
            "these take one forward pass, in which nothing is let go; use model hf"
        )


def main() -> None:
    """Run the harness's own command line, which then knows this model."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
