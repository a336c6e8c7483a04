"""Count the pieces into which a SentencePiece unigram model cuts a text, as T5's tokenizer does, without sentencepiece.

Written after google/sentencepiece, src/normalizer.cc and src/unigram_model.cc. `tokenizers` counts otherwise for some
texts: it replaces marks that follow a letter one by one, and adds scores in another precision.
"""

from __future__ import annotations

import math
import re
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from capkit.text import encodable

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces in sentencepiece_model.proto
SPACE = "\u2581"  # in pieces
UNKNOWN_PENALTY = 10.0
NO_START = object()
# All that "nmt_nfkc" may change: it leaves printable ASCII as it is, but composes a letter with the marks after it.
CHANGEABLE = re.compile(r"[ -~]?[^ -~]+")


class UnigramModel:
    """A `spiece.model`.

    Raises:
        ValueError: it is damaged, or not a model like T5's.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        pieces: list[dict[int, Any]] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        try:
            for number, value in _fields(path.read_bytes()):
                if number == 1:
                    pieces.append({3: NORMAL} | dict(_fields(value)))
                elif number in (2, 3):
                    (trainer if number == 2 else normalizer).update(_fields(value))
            vocabulary = [(piece[1].decode(), *struct.unpack("<f", piece[2])) for piece in pieces if piece[3] == NORMAL]
            size = int.from_bytes(normalizer[2][:4], "little")
            self._units = np.frombuffer(normalizer[2], "<u4", size // 4, 4).tolist()
        except (ValueError, KeyError, AttributeError, TypeError, IndexError, struct.error) as error:
            raise ValueError(f"{path}: is damaged, or no SentencePiece model") from error
        self._texts = normalizer[2][4 + size :]
        self._keeps_spaces = normalizer.get(4) == 0
        kinds = {piece[3] for piece in pieces}
        ends = [piece[1] for piece in pieces if piece[3] == CONTROL]
        is_like_t5 = trainer.get(3, 1) == 1 and normalizer.get(1) == b"nmt_nfkc" and normalizer.get(3) != 0
        if not is_like_t5 or kinds - {NORMAL, UNKNOWN, CONTROL} or b"</s>" not in ends:
            raise ValueError(f"{path}: is not a unigram model like T5's; give a folder with tokenizer.json")
        self._unknown = float(np.float32(min(score for _, score in vocabulary) - UNKNOWN_PENALTY))
        starts = (piece[:length] for piece, _ in vocabulary for length in range(1, len(piece)))
        self._scores = dict.fromkeys(starts) | dict(vocabulary)  # None: only the start of a piece

    def count(self, text: str) -> int:
        """The number of pieces of a text; "" has none."""
        text = self._normalise(text)
        size, scores, rounded = len(text), self._scores, array("f", [0])  # sums are rounded to float32
        best = [0.0] + [-math.inf] * size  # score, for each place in the text
        last = [0] * (size + 1)  # where the piece before that place starts
        unknown = set()  # places after an unknown letter
        for start in range(size):
            has_piece = False  # of this letter alone
            for end in range(start + 1, size + 1):
                score = scores.get(text[start:end], NO_START)
                if score is NO_START:
                    break
                if score is not None:
                    has_piece |= end == start + 1
                    rounded[0] = best[start] + score
                    if rounded[0] > best[end]:
                        best[end], last[end] = rounded[0], start
                        unknown.discard(end)
            if not has_piece:
                rounded[0] = best[start] + self._unknown
                if rounded[0] > best[start + 1]:
                    best[start + 1], last[start + 1] = rounded[0], start
                    unknown.add(start + 1)
        number, end = 0, size
        while end:
            number += not (end in unknown and last[end] in unknown)  # unknown letters in a row are one piece
            end = last[end]
        return number

    def _normalise(self, text: str) -> str:
        text = CHANGEABLE.sub(self._replace, encodable(text))
        if not self._keeps_spaces:
            text = re.sub(" +", " ", text).strip(" ")
        text = f" {text}".replace(" ", SPACE) if text else ""
        return text if self._keeps_spaces else text.rstrip(SPACE)

    def _replace(self, match: re.Match[str]) -> str:
        """Replace characters as the model says, at each place the most that it has a replacement for."""
        text, replaced, at = match[0], [], 0
        while at < len(text):
            length, replacement = self._longest(text, at)
            replaced.append(replacement if length else text[at])
            at += length or 1
        return "".join(replaced)

    def _longest(self, text: str, at: int) -> tuple[int, str]:
        """How many characters from `at` on it replaces, and by what; from its double-array trie (Darts-clone)."""
        length, replacement, node = 0, "", _offset(self._units[0])
        for end in range(at, len(text)):
            for byte in text[end].encode():
                node ^= byte
                unit = self._units[node]
                if unit & 0x800000FF != byte:
                    return length, replacement
                node ^= _offset(unit)
            if unit >> 8 & 1:
                start = self._units[node] & 0x7FFFFFFF
                length = end + 1 - at
                replacement = self._texts[start : self._texts.index(0, start)].decode()
        return length, replacement


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: whole numbers as such, anything else as bytes.

    Raises:
        ValueError, IndexError: the message is none, or cut short.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else len(message))
        if at + length > len(message):
            raise ValueError("a field is longer than its message")
        yield number, message[at : at + length]
        at += length
