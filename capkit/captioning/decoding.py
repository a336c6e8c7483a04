"""`Decoding`: the settings of token generation, checked. No models or tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from capkit.captioning.words import check_bias, check_words, first_word_in, fold
from capkit.text import unknown_name
from capkit.video import finite_float

# Defaults for sampling in transformers 4.4x, on which the original runs.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50}
MOST_BEAMS = 1000  # each takes memory like a clip of its own
_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "seed")
# Arguments of generate() that do not affect which tokens are chosen here: the captioner sets them itself.
_IGNORED = {"pad_token_id", "eos_token_id", "bos_token_id", "use_cache", "num_return_sequences"}


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. Temperature 0 is greedy; a setting that would have no effect is an error that names it.

    Field names are those of transformers' `GenerationConfig`. The defaults are the effective settings of the original
    caption tool: it passes `do_sample=False, top_k=1, top_p=0.1, temperature=0.1`, which is greedy search.

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
        forbidden_words: words and phrases that the caption never holds as whole words, in any case, with any white
            space and however tokens spell them. Give each form, such as plurals. A token that completes one at the end
            of the text is never chosen, though a longer word might go on from there ("cat" before "egory"): in one
            token, or in tokens that split it elsewhere, it can still be said. The end token is always allowed.
        word_bias: numbers by word or phrase; above 0 makes it likelier. The number is added to the logit of each token
            that begins it or, where it is begun, continues it. These are the tokens in which the tokenizer writes it as
            given, in lower case and with a capital, after a space, or without one where no word is being written. Other
            words that begin with these tokens change too, and the numbers of words that share a token add up there.
        dropped: what `from_generate_kwargs` left out because it has no effect. Not a setting, not compared.

    Raises:
        ValueError: a value outside its range, or a setting that has no effect in combination with the others.
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
    forbidden_words: Sequence[str] = ()
    word_bias: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    dropped: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("no_repeat_ngram_size", 0)):
            self._set_integer(name, low)
        self._set_integer("num_beams", 1, MOST_BEAMS)
        if self.seed is not None:
            self._set_integer("seed", 0, 2**63 - 1)
        for name, allowed, is_allowed in (
            ("temperature", "from 1e-6 to 1e6, or 0 (greedy)", lambda x: x == 0 or 1e-6 <= x <= 1e6),
            ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("min_p", "at least 0 and below 1", lambda x: 0 <= x < 1),
            ("repetition_penalty", "from 1e-6 to 1e6 (1.0 for none)", lambda x: 1e-6 <= x <= 1e6),
        ):
            number = finite_float(value := getattr(self, name))
            if number is None or not is_allowed(number):
                raise ValueError(f"{name}={value!r}: must be a number {allowed}")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "forbidden_words", check_words("forbidden_words", self.forbidden_words))
        object.__setattr__(self, "word_bias", check_bias("word_bias", self.word_bias))
        self._refuse_ineffective_settings()

    def _set_integer(self, name: str, low: int, high: float = math.inf) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name}={value!r}: must be a whole number {limits}")
        object.__setattr__(self, name, int(value))

    def _refuse_ineffective_settings(self) -> None:
        if self.temperature == 0:
            reason = "temperature is 0, which is greedy: set a temperature above 0 to sample"
            names = [name for name in _SAMPLING_ONLY if getattr(self, name) != _DEFAULTS[name]]
        elif self.num_beams > 1:
            reason = f"num_beams={self.num_beams} is beam search, which does not sample here: choose one of the two"
            names = ["temperature"]
        elif self.top_k == 1:
            reason = "top_k=1 leaves one token to draw, which is greedy: leave both out, or raise top_k"
            names = ["temperature"]
        else:
            names = []
        if names:
            settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise ValueError(f"{settings}: no effect, because {reason}")
        for word in dict(self.word_bias):
            if fold(word) in map(fold, self.forbidden_words):
                raise ValueError(f"word_bias: {word!r} has no effect, because forbidden_words forbids it")

    def check_prefix(self, answer_prefix: str) -> None:
        """Raise ValueError if a caption that begins so would hold one of the `forbidden_words`."""
        if (word := first_word_in(answer_prefix, self.forbidden_words)) is not None:
            raise ValueError(f"answer_prefix={answer_prefix!r}: holds {word!r}, which forbidden_words forbids")

    @property
    def is_steered(self) -> bool:
        """True where words are forbidden, or made more or less likely."""
        return bool(self.forbidden_words or self.word_bias)

    @property
    def samples(self) -> bool:
        """True where tokens are drawn, so that another seed gives another caption."""
        return self.temperature > 0

    def to_dict(self) -> dict[str, Any]:
        """The effective settings: `max_new_tokens` and all that differ from the defaults.

        Equal dictionaries mean equal captions. Under sampling the seed is always included.
        """
        values = {name: getattr(self, name) for name in _DEFAULTS}
        changed = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
        for name, plain in (("forbidden_words", list), ("word_bias", dict)):
            changed |= {name: plain(changed[name])} if name in changed else {}
        settings = {"max_new_tokens": self.max_new_tokens} | changed
        return settings | ({"seed": self.seed or 0} if self.samples else {})

    @classmethod
    def of(cls, settings: DecodingLike | None) -> Decoding:
        """A `Decoding` from a `Decoding`, from None (the defaults), or from a dictionary of fields.

        A dictionary that contains `do_sample` is taken as arguments of `generate()`: see `from_generate_kwargs`.
        """
        if isinstance(settings, cls):
            return settings
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"decoding={settings!r}: must be a Decoding or a dictionary of its settings")
        settings = settings or {}
        if "do_sample" in settings:
            return cls.from_generate_kwargs(**settings)
        _refuse_unknown(settings, _DEFAULTS)
        return cls(**settings)

    @classmethod
    def from_generate_kwargs(cls, **kwargs: Any) -> Decoding:
        """The effective settings of arguments of transformers' `generate()`; the others are in `.dropped`.

        With `do_sample=False` (generate's default) temperature, top_k, top_p, min_p and seed have no effect, so the
        original tool's `do_sample=False, top_k=1, top_p=0.1, temperature=0.1, max_new_tokens=2048` is
        `Decoding(max_new_tokens=2048)`. With `do_sample=True`, arguments left out take the defaults of transformers
        4.4x, on which the original runs: temperature 1.0 and top_k 50.

        Raises:
            ValueError: an argument that capkit does not offer, or a value outside its range.
        """
        _refuse_unknown(kwargs, {*_DEFAULTS, *_IGNORED, "do_sample"})
        if kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences: caption several times with different seeds instead")
        settings = {name: value for name, value in kwargs.items() if name not in _IGNORED and value is not None}
        if settings.pop("do_sample", False):
            settings = _SAMPLING_DEFAULTS | settings
            if settings["top_k"] != 1 and settings["temperature"] != 0:
                return cls(**settings)
        kept = {name: value for name, value in settings.items() if name not in _SAMPLING_ONLY}
        dropped = {name: settings[name] for name in settings if name not in kept and settings[name] != _DEFAULTS[name]}
        return cls(**kept, dropped=dropped)

    def __str__(self) -> str:
        kind = "sampling" if self.samples else "beam search" if self.num_beams > 1 else "greedy"
        return f"{kind} (" + ", ".join(f"{name}={value}" for name, value in self.to_dict().items()) + ")"


DecodingLike = Decoding | dict[str, Any]
"""What `Decoding.of` takes."""

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Decoding) if f.name != "dropped"}


def _refuse_unknown(settings: dict[str, Any], allowed: Collection[str]) -> None:
    for name in settings:
        if name not in allowed:
            raise ValueError(unknown_name("decoding setting", name, sorted(allowed), "known"))
