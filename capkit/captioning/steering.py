"""Steering: keep forbidden words out of captions, whatever tokens spell them, and make words more or less likely."""

from __future__ import annotations

import codecs
import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from capkit.captioning.decoding import Decoding
from capkit.captioning.words import fold, is_word_character, not_continued, spellings, whole

_END = "\U0010ffff"  # stands before the text of each token; no character, so that no text has it
_CUT = 3  # characters that are garbled at most, where a text begins within one
Bias = tuple[tuple[str, float], ...]


class Vocabulary:
    """What each token of a byte-level tokenizer adds to a decoded caption.

    Attributes:
        pieces: the bytes of each token; none of a special one, which is not decoded.
        text: `fold` of each token's text, by id, behind an `_END`; incomplete characters at their ends are left out.
        fragments: tokens that begin within a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokens = tokenizer.get_vocab()
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.pieces = [b""] * (max(tokens.values()) + 1)
        for token, number in tokens.items():
            if number not in special:
                is_plain = _BYTES.keys() >= set(token)  # else the tokenizers library takes it as it is
                self.pieces[number] = bytes(_BYTES[name] for name in token) if is_plain else token.encode()
        self.text = fold("".join(_END + _decode(piece)[0] for piece in self.pieces)) + _END
        self._starts = np.array([match.start() for match in re.finditer(_END, self.text)])
        self.fragments = [number for number, piece in enumerate(self.pieces) if piece and 0x80 <= piece[0] < 0xC0]

    def find(self, pattern: str) -> Iterator[tuple[int, str]]:
        """The token of each match in `text`, and the character before it; matches may overlap."""
        compiled, place = re.compile(pattern), 0
        while match := compiled.search(self.text, place):
            place = match.start() + 1
            yield int(np.searchsorted(self._starts, match.start(), "right")) - 1, self.text[match.start() - 1]

    def decode(self, ids: Sequence[int]) -> tuple[str, bytes]:
        """The folded text of tokens up to the last complete character, and the bytes after it."""
        text, rest = _decode(b"".join(self.pieces[number] for number in ids if number < len(self.pieces)))
        return fold(text), rest


def _byte_names() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_names()
_vocabulary = functools.lru_cache(maxsize=4)(Vocabulary)


def _decode(content: bytes) -> tuple[str, bytes]:
    """The text of bytes up to the last complete character, and the bytes after it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(content), decoder.getstate()[0]


class Steering:
    """What the forbidden words and the word biases of a `Decoding` add to logits, from the caption's tokens so far.

    Args:
        tokenizer: Llama-3's, byte-level.
        forbidden_words, word_bias: of the `Decoding`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, forbidden_words: tuple[str, ...], word_bias: Bias) -> None:
        self.vocabulary = _vocabulary(tokenizer)
        self._biases = [_Bias(tokenizer, word, number) for word, number in word_bias]
        forbidden = [spelling for word in forbidden_words for spelling in spellings(word)]
        self._longest = max(map(len, forbidden), default=0)
        self._forbidden = re.compile("|".join(map(whole, forbidden)) or r"(?!)")
        self._begun: dict[str, list[tuple[str, int]]] = defaultdict(list)  # parts of words, by their last character
        always, at_start = set[int](), set[int]()  # tokens that hold a word; that do where no word is being written
        for word in forbidden:
            for length in range(1, len(word)):
                self._begun[word[length - 1]].append((word, length))
            for token, before in self.vocabulary.find(not_continued(word)):
                if before == _END and is_word_character(word[0]):
                    at_start.add(token)
                elif not (is_word_character(word[0]) and is_word_character(before)):
                    always.add(token)
        self._always, self._at_start = np.array([*always], np.int64), np.array([*at_start], np.int64)
        self._completing = functools.cache(self._find_completing)
        self._completing_characters = functools.lru_cache(maxsize=256)(self._find_completing_characters)

    def __call__(self, rows: Sequence[Sequence[int]], scores: torch.Tensor) -> torch.Tensor:
        """Steered scores, from scores (B, V) and each row's tokens so far, those of the answer prefix first."""
        places, values = [np.empty(0)], [np.empty(0)]
        for row, ids in enumerate(rows):
            text, rest = self._text(ids)
            is_open = bool(rest) or not text or not is_word_character(text[-1])
            changes = [(tokens, -np.inf) for tokens in self._forbidden_tokens(text, rest, is_open)]
            for bias in self._biases:
                changes.append((np.array([*bias.tokens(ids, is_open)]), bias.number))
            for tokens, value in changes:
                places.append(tokens + row * scores.shape[-1])
                values.append(np.full(len(tokens), value))
        sent = torch.from_numpy(np.stack([np.concatenate(places), np.concatenate(values)]))
        sent = sent.pin_memory() if scores.device.type == "cuda" else sent  # a copy from other memory would synchronise
        sent = sent.to(scores.device, non_blocking=True)
        return scores.flatten().index_add(0, sent[0].long(), sent[1].to(scores.dtype)).view_as(scores)

    def _text(self, ids: Sequence[int]) -> tuple[str, bytes]:
        """The end of the folded text, one character longer than any forbidden word, and the bytes after it."""
        count = self._longest + 1 + _CUT
        while True:
            text, rest = self.vocabulary.decode(ids[-count:])
            if len(text) > self._longest + _CUT or count >= len(ids):
                return text[-self._longest - 1 :], rest
            count *= 2

    def _forbidden_tokens(self, text: str, rest: bytes, is_open: bool) -> Iterator[np.ndarray]:
        """Tokens that complete a forbidden word behind this text."""
        yield self._always
        if is_open:
            yield self._at_start
        if rest:
            yield self._completing_characters(text, rest)
            return
        for word, length in self._begun.get(text[-1:], ()):
            if text.endswith(word[:length]):
                before = text[-length - 1 : -length]
                if not (before and is_word_character(before) and is_word_character(word[0])):
                    yield self._completing(word, length)

    def _find_completing(self, word: str, length: int) -> np.ndarray:
        """Tokens that complete a word behind its first `length` characters."""
        space = " ?" if word[length - 1] == " " else ""  # more white space is still one
        found = self.vocabulary.find(_END + space + not_continued(word[length:]))
        return np.array([token for token, _ in found], np.int64)

    def _find_completing_characters(self, text: str, rest: bytes) -> np.ndarray:
        """Tokens that complete a character, and with it a forbidden word."""
        start, tokens = max(len(text) - self._longest, 0), []
        for token in self.vocabulary.fragments:
            added, _ = _decode(rest + self.vocabulary.pieces[token])
            if self._forbidden.search(fold(text + added), start):
                tokens.append(token)
        return np.array(tokens, np.int64)


class _Bias:
    """The tokens that begin or continue a word, see `Decoding.word_bias`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, word: str, number: float) -> None:
        self.number, self._longest = number, 0
        self._first: tuple[set[int], set[int]] = (set(), set())  # after a space, without one
        self._next: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for form in {word, word.lower(), word[0].upper() + word[1:]}:
            for firsts, space in zip(self._first, (" ", ""), strict=True):
                ids = tokenizer.encode(space + form, add_special_tokens=False)
                firsts.add(ids[0])
                for place in range(1, len(ids)):
                    self._next[tuple(ids[:place])].add(ids[place])
                self._longest = max(self._longest, len(ids) - 1)

    def tokens(self, ids: Sequence[int], is_open: bool) -> set[int]:
        """Those behind these tokens; `is_open` says that no word is being written."""
        for count in range(min(self._longest, len(ids)), 0, -1):  # of what it may have begun with, the most
            if begun := self._next.get(tuple(ids[-count:])):
                return begun
        return self._first[0].union(self._first[1] if is_open else ())


@functools.lru_cache(maxsize=32)
def _steering(tokenizer: PreTrainedTokenizerFast, forbidden_words: tuple[str, ...], word_bias: Bias) -> Steering:
    return Steering(tokenizer, forbidden_words, word_bias)


class SteerRows(LogitsProcessor):
    """Steer the rows of a batch, or of beam search, in which each is there once for each beam.

    Args:
        tokenizer: the model's.
        decoding: whose words count.
        prefixes: token ids of each row's answer prefix.
        prompt_length: as of `Chooser`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        decoding: Decoding,
        prefixes: Sequence[Sequence[int]],
        prompt_length: int = 0,
    ) -> None:
        self.steering = _steering(tokenizer, decoding.forbidden_words, decoding.word_bias)
        self.prefixes, self.prompt_length = prefixes, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.steer(input_ids[:, self.prompt_length :].tolist(), scores)

    def steer(self, new_ids: Sequence[Sequence[int]], scores: torch.Tensor, rows: Sequence[int] = ()) -> torch.Tensor:
        """Steered scores (B, V) of these rows (all if empty), with their new tokens so far."""
        num_beams = len(new_ids) // len(self.prefixes) or 1
        rows = rows or [place // num_beams for place in range(len(new_ids))]
        return self.steering([[*self.prefixes[row], *ids] for row, ids in zip(rows, new_ids, strict=True)], scores)
