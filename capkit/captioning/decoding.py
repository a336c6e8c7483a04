"""Decoding settings: what was asked for, and what of it has an effect. Knows nothing of models or tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

# What transformers 4.4x, which the original runs on, assumes when a sampling call leaves these out.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50}
# Settings that act on the draw alone.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
# Arguments of generate() that choose no token here: the captioner sets them itself.
_PLUMBING = {"pad_token_id", "eos_token_id", "bos_token_id", "use_cache", "num_return_sequences"}


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. Temperature 0 is greedy; a setting that would have no effect is an error that names it.

    Field names are those of transformers' `GenerationConfig`. The defaults are what CogVLM2-Caption's own tool really
    does: it passes `do_sample=False, top_k=1, top_p=0.1, temperature=0.1`, which is greedy search.

    Attributes:
        max_new_tokens: most tokens to generate, the end token included.
        temperature: 0 for greedy (or beam) search; above 0, logits are divided by it and a token is drawn.
        top_p: draw from the most probable tokens whose probabilities add up to this; 1.0 means all.
        top_k: draw from this many most probable tokens; 0 means all.
        min_p: draw from tokens at least this fraction as probable as the most probable one; 0.0 means all.
        num_beams: beams kept in beam search; 1 means none. Beam search does not sample.
        repetition_penalty: above 1.0 makes tokens that were already generated less likely. The prompt does not count.
        no_repeat_ngram_size: forbid any run of this many generated tokens to come twice; 0 forbids nothing.
        seed: of the draw, when temperature is above 0; None means 0, so that every result can be repeated. The same
            seed draws differently for another clip.
        dropped: what `from_generate_kwargs` left out because it has no effect. Not a setting, not compared.

    Raises:
        ValueError: a value outside its range, or a setting that would have no effect beside the others.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    dropped: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name, low, high in (
            ("max_new_tokens", 1, math.inf),
            ("top_k", 0, math.inf),
            ("num_beams", 1, math.inf),
            ("no_repeat_ngram_size", 0, math.inf),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {low}")
            object.__setattr__(self, name, int(value))
        for name, allowed, good in (
            ("temperature", "0 (greedy) or above", lambda x: x >= 0),
            ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("min_p", "at least 0 and below 1", lambda x: 0 <= x < 1),
            ("repetition_penalty", "above 0 (1.0 for none)", lambda x: x > 0),
        ):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not good(value):
                raise ValueError(f"{name}={value!r}: must be a number {allowed}")
            # Not float(np.float32(0.8)), which is 0.800000011920929 and would be another request than 0.8.
            object.__setattr__(self, name, float(str(value)) if isinstance(value, np.floating) else float(value))
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        if self.temperature == 0:
            why = "temperature is 0, which is greedy: set a temperature above 0 to sample"
            idle = [name for name in _SAMPLING if self._is_set(name)]
        elif self.num_beams > 1:
            why = f"num_beams={self.num_beams} is beam search, which does not sample here: choose one of the two"
            idle = ["temperature"]
        elif self.top_k == 1:
            why = "top_k=1 leaves one token to draw, which is greedy: leave both out, or raise top_k"
            idle = ["temperature"]
        else:
            return
        if idle:
            settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in idle)
            raise ValueError(f"{settings}: no effect, because {why}")

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != next(f.default for f in dataclasses.fields(self) if f.name == name)

    @property
    def samples(self) -> bool:
        """True where tokens are drawn, so that another seed gives another caption."""
        return self.temperature > 0

    def to_dict(self) -> dict[str, Any]:
        """The settings that have an effect: `max_new_tokens` and all that differ from the defaults.

        Equal dictionaries mean equal captions. Under sampling the seed is always there.
        """
        names = [f.name for f in dataclasses.fields(self) if f.name != "dropped" and self._is_set(f.name)]
        settings = {"max_new_tokens": self.max_new_tokens} | {name: getattr(self, name) for name in names}
        return settings | ({"seed": self.seed or 0} if self.samples else {})

    @classmethod
    def of(cls, settings: DecodingLike | None) -> Decoding:
        """A `Decoding` from itself, from None (the defaults), or from a dictionary of fields.

        A dictionary with `do_sample` in it is taken for arguments of `generate()`: see `from_generate_kwargs`.
        """
        if isinstance(settings, cls):
            return settings
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"decoding={settings!r}: must be a Decoding or a dictionary of its settings")
        settings = settings or {}
        if "do_sample" in settings:
            return cls.from_generate_kwargs(**settings)
        _refuse_unknown(settings, _fields(cls))
        return cls(**settings)

    @classmethod
    def from_generate_kwargs(cls, **kwargs: Any) -> Decoding:
        """What these arguments of transformers' `generate()` really do; what they do not do is in `.dropped`.

        With `do_sample=False` (generate's default) temperature, top_k, top_p, min_p and seed have no effect, so the
        original tool's `do_sample=False, top_k=1, top_p=0.1, temperature=0.1, max_new_tokens=2048` is
        `Decoding(max_new_tokens=2048)`. With `do_sample=True`, what is left out takes generate's own defaults of
        transformers 4.4x, on which the original runs: temperature 1.0 and top_k 50.

        Raises:
            ValueError: an argument that capkit does not offer, or a value outside its range.
        """
        _refuse_unknown(kwargs, {*_fields(cls), *_PLUMBING, "do_sample"})
        if kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences: caption several times with different seeds instead")
        asked = {name: value for name, value in kwargs.items() if name not in _PLUMBING and value is not None}
        if asked.pop("do_sample", False):
            asked = _SAMPLING_DEFAULTS | asked
            if asked["top_k"] != 1 and asked["temperature"] != 0:
                return cls(**asked)
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        kept = {name: value for name, value in asked.items() if name not in _SAMPLING}
        dropped = {name: value for name, value in asked.items() if name in _SAMPLING and value != defaults[name]}
        return cls(**kept, dropped=dropped)

    def __str__(self) -> str:
        kind = "sampling" if self.samples else "beam search" if self.num_beams > 1 else "greedy"
        return f"{kind} (" + ", ".join(f"{name}={value}" for name, value in self.to_dict().items()) + ")"


DecodingLike = Decoding | dict[str, Any]
"""What `Decoding.of` takes."""


def _fields(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name != "dropped"]


def _refuse_unknown(settings: dict[str, Any], allowed) -> None:
    if unknown := sorted(set(settings) - set(allowed)):
        raise ValueError(f"unknown decoding settings {', '.join(unknown)}; known: {', '.join(sorted(allowed))}")
