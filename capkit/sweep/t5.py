"""Count the T5 tokens of a caption: CogVideoX encodes captions with T5 and truncates them at its limit."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from capkit.sweep.unigram import UnigramModel

# T5 tokens that the trainers keep, `</s>` included; longer captions are truncated silently.
COGVIDEOX_T5_LIMIT = 226  # CogVideoX 2B and 5B
COGVIDEOX_1_5_T5_LIMIT = 224  # CogVideoX1.5
VOCABULARY = Path(__file__).with_name("t5_vocabulary") / "spiece.model"  # of T5, and so of every CogVideoX


def t5_counter(tokenizer: Any = None) -> Callable[[str], int]:
    """Make a function that counts the T5 tokens of a text, `</s>` included.

    Args:
        tokenizer: None or "" for T5's own vocabulary, which capkit brings; else a transformers tokenizer, or the folder
            of one (nothing is downloaded).

    Raises:
        ValueError: the folder has no tokenizer, or another model's.
    """
    if tokenizer is None or tokenizer == "":
        return _count_own
    if isinstance(tokenizer, str | os.PathLike):
        folder = Path(tokenizer).expanduser()
        if not (folder / "tokenizer.json").exists() and (folder / VOCABULARY.name).exists():
            model = UnigramModel(folder / VOCABULARY.name)  # transformers would need sentencepiece for it
            return lambda text: model.count(text) + 1
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{tokenizer} is no folder with a T5 tokenizer's files: {error}") from error
        if tokenizer.convert_ids_to_tokens(tokenizer("A dog.").input_ids)[-1] != "</s>":
            raise ValueError(f"{tokenizer.name_or_path} is no T5 tokenizer: it does not end a text with </s>")
    return lambda text: len(tokenizer(text, verbose=False).input_ids)  # verbose warns about long texts


def _count_own(text: str) -> int:
    return _own_model().count(text) + 1


@cache
def _own_model() -> UnigramModel:
    return UnigramModel(VOCABULARY)
