"""How a user names a policy and a budget: ``"h2o:decay=0.9"``, ``"0.2"``, ``"409"``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from spectralkv.config import Population

FULL = "full"
#: The option whose values are written in a syntax of their own.
POPULATIONS = "populations"


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """A policy by name with the options that differ from its defaults.

    Attributes
    ----------
    name : str
        One of `spectralkv.policies.available()`.
    options : tuple of (str, object)
        Options of the policy, in the order they were given.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Read ``name`` or ``name:option=value,option=value``.

        The populations of Spectral are written ``restart:count:share``, joined by ``+``, as in
        ``spectral:populations=recent:edges:0.5+novelty:all:0.5``. A fourth field says how many
        tokens are recent: a part of those seen (``recent:edges:0.5:0.2``) or, without a point, so
        many (``recent:edges:0.5:128``). A fifth is the decay of the population's scores, where the
        fourth may be empty: ``recent:edges:0.5:32:0.9+novelty:all:0.5::0``. A last field ``exact``
        says that its scores are found by no walk, but exactly:
        ``recent:edges:0.6+novelty:all:0.4:exact``.

        Raises
        ------
        EvaluationError
            The text is not of that form, or there is no policy of that name.
        """
        from spectralkv import policies

        name, _, rest = text.strip().partition(":")
        known = {policies.plain_name(policy): policy for policy in policies.available()}
        if policies.plain_name(name) not in known:
            raise EvaluationError(
                f"unknown policy {name!r}: choose from {', '.join(known.values())}"
            )
        options = []
        for item in rest.split(",") if rest else []:
            key, equals, value = item.partition("=")
            if not equals or not key.strip().isidentifier():
                raise EvaluationError(
                    f"policy {text!r}: options are written name:option=value,option=value"
                )
            key, value = key.strip(), value.strip()
            # An option of a part of a mix is written part__option.
            is_populations = key.rpartition("__")[2] == POPULATIONS and value.lower() != "none"
            options.append((key, (_parse_populations if is_populations else _parse_value)(value)))
        return cls(name=known[policies.plain_name(name)], options=tuple(options))

    @property
    def label(self) -> str:
        """The specification as `parse` reads it."""
        if not self.options:
            return self.name
        return self.name + ":" + ",".join(f"{key}={_format(value)}" for key, value in self.options)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget as the user gave it: tokens, or a fraction of the text.

    Attributes
    ----------
    tokens : int or None
        Tokens to keep a layer and KV head.
    fraction : float or None
        Share of the text's tokens to keep, in (0, 1]. Exactly one of the two is set.
    """

    tokens: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.fraction is None):
            raise EvaluationError("a budget is either tokens or a fraction")
        if self.tokens is not None and self.tokens < 1:
            raise EvaluationError(f"budget must be at least 1 token, got {self.tokens}")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise EvaluationError(
                f"budget as a fraction must be above 0 and at most 1, got {self.fraction:g}"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"409"`` (tokens), ``"0.2"`` or ``"20%"`` (fractions).

        Raises
        ------
        EvaluationError
            The text is none of these, or not positive.
        """
        text = text.strip()
        try:
            if text.endswith("%"):
                return cls(fraction=float(text[:-1]) / 100.0)
            if text.lstrip("+-").isdigit():
                return cls(tokens=int(text))
            return cls(fraction=float(text))
        except EvaluationError:
            raise
        except ValueError:
            raise EvaluationError(
                f"budget must be tokens (409) or a fraction (0.2 or 20%), got {text!r}"
            ) from None

    def resolve(self, length: int) -> int:
        """Return the budget in tokens for a text of `length` tokens.

        A fraction is rounded down, so that the share asked for is never exceeded.

        Raises
        ------
        EvaluationError
            The fraction of the text is less than one token.
        """
        if self.fraction is None:
            return self.tokens or 0
        tokens = math.floor(self.fraction * length + 1e-9)  # .29 * 100 is 28.999999999999996
        if tokens < 1:
            raise EvaluationError(
                f"budget must be at least 1 token, got {self.fraction:g} of {length} tokens"
            )
        return tokens


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parse_populations(text: str) -> tuple[Population, ...]:
    from spectralkv import InvalidArgument
    from spectralkv.config import Population

    def population(item: str) -> Population:
        restart, count, share, *rest = item.split(":")
        options: dict[str, Any] = {}
        if rest and rest[-1] == "exact":
            options["solver"] = rest.pop()
        recent, decay = [*rest, *[""] * (2 - len(rest))]
        if recent.isdigit():
            options["recent_tokens"] = int(recent)
        elif recent:
            options["recent_fraction"] = float(recent)
        if decay:
            options["decay"] = float(decay)
        return Population(restart=restart, count=count, share=float(share), **options)  # type: ignore[arg-type]

    try:
        return tuple(population(item.strip()) for item in text.split("+"))
    except InvalidArgument as error:
        raise EvaluationError(f"populations {text!r}: {error}") from None
    except ValueError:
        raise EvaluationError(
            "populations are written restart:count:share or with :recent or :recent:decay behind, "
            "and :exact behind all, joined by +, such as recent:edges:0.5+novelty:all:0.5:exact; "
            f"got {text!r}"
        ) from None


def _format(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return "+".join(map(_format_population, value))


def _format_population(population: Population) -> str:
    fields = [population.restart, population.count, str(population.share)]
    if population.recent_tokens:
        fields.append(str(population.recent_tokens))
    elif population.recent_fraction != type(population)().recent_fraction:
        fields.append(str(float(population.recent_fraction)))
    elif population.decay is not None:
        fields.append("")
    if population.decay is not None:
        fields.append(str(float(population.decay)))
    if population.solver == "exact":
        fields.append(population.solver)
    return ":".join(fields)
