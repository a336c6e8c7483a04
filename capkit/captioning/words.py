"""Words as `Decoding` names them: checked, and found in texts. No models or tensors."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from capkit.text import encodable
from capkit.video import finite_float

MOST_CHARACTERS = 200  # of a word or phrase: what is kept for a biased one grows with the square
MOST_BIAS = 100.0  # either way; logits of neighbouring tokens are some ten apart
_APOSTROPHES = {ord(mark): "'" for mark in "\u2018\u2019\u02bc"}


def fold(text: str) -> str:
    """A text as words are compared: in one case, with one kind of apostrophe, each run of white space one space.

    The fold of two texts together is that of each, but for a space where white space meets white space.
    """
    return re.sub(r"\s+", " ", text.casefold().translate(_APOSTROPHES))


def spellings(word: str) -> list[str]:
    """A word as `fold` leaves it, with its accents as parts of letters and as characters of their own."""
    return list(dict.fromkeys(fold(unicodedata.normalize(form, word)) for form in ("NFC", "NFD")))


def is_word_character(character: str) -> bool:
    r"""Whether a character is part of a word: `\w` of regular expressions."""
    return re.match(r"\w", character) is not None


def not_continued(spelling: str) -> str:
    r"""A pattern for the end of a folded text, with no word character behind it if it ends with one."""
    return re.escape(spelling) + (r"(?!\w)" if is_word_character(spelling[-1]) else "")


def whole(spelling: str) -> str:
    r"""A pattern for it as whole words of a folded text."""
    return (r"(?<!\w)" if is_word_character(spelling[0]) else "") + not_continued(spelling)


def first_word_in(text: str, words: Sequence[str]) -> str | None:
    """The first of these words that a text holds as whole words; None if it holds none."""
    folded = fold(text)
    for word in words:
        if any(re.search(whole(spelling), folded) for spelling in spellings(word)):
            return word
    return None


def check_words(name: str, words: Any) -> tuple[str, ...]:
    """Words in order, each once, with single spaces.

    Raises:
        ValueError: no list or tuple of texts, or one that is empty, longer than MOST_CHARACTERS or not UTF-8.
    """
    if isinstance(words, str) or not isinstance(words, (list, tuple)):
        raise ValueError(f"{name}={words!r:.300}: must be a list of words or phrases")
    checked: dict[str, str] = {}
    for word in words:
        if not isinstance(word, str) or not word.strip() or encodable(word) != word or len(word) > MOST_CHARACTERS:
            rule = f"which is no word or phrase (of at most {MOST_CHARACTERS} characters)"
            raise ValueError(f"{name}: {word!r:.{MOST_CHARACTERS}} is in it, {rule}")
        checked.setdefault(fold(word).strip(), " ".join(word.split()))
    return tuple(checked[key] for key in sorted(checked))


def check_bias(name: str, bias: Any) -> tuple[tuple[str, float], ...]:
    """(word, number) pairs in order.

    Raises:
        ValueError: no dictionary or pairs, what `check_words` refuses, a word twice, or a number out of range or 0.
    """
    pairs = list(bias.items()) if isinstance(bias, Mapping) else bias
    if not isinstance(pairs, (list, tuple)) or {type(pair) in (list, tuple) and len(pair) for pair in pairs} - {2}:
        raise ValueError(f"{name}={bias!r}: must be a dictionary of words and numbers")
    numbers: dict[str, float] = {}
    for word, given in pairs:
        (word,) = check_words(name, [word])
        number = finite_float(given)
        if number is None or abs(number) > MOST_BIAS:
            raise ValueError(
                f"{name}: {given!r} of {word!r} must be a number from {-MOST_BIAS:g} to {MOST_BIAS:g}; "
                "what must never be said goes into forbidden_words"
            )
        if number == 0:
            raise ValueError(f"{name}: 0 of {word!r} has no effect; leave it out")
        if fold(word) in map(fold, numbers):
            raise ValueError(f"{name}: {word!r} is there twice, also in another case")
        numbers[word] = number
    return tuple(sorted(numbers.items(), key=lambda pair: fold(pair[0])))
