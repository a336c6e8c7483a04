"""Read a checkpoint's tokenizer: Llama-3's, from `tokenizer.json`, and checked before it is relied on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from capkit.cogvlm2.checkpoint import CheckpointError, read_file, read_json
from capkit.cogvlm2.configuration import CogVLM2VideoConfig

# What Llama-3's tokenizer is made of. Other parts may make texts longer without limit, and other patterns may search
# without end, which the tokenizers library cannot be stopped at.
PARTS = ("Sequence", "Split", "ByteLevel", "TemplateProcessing")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PROBE = "Question: Describe second 23, please.\n Ein grüner Stern: \U0001f31f! Answer:"


def read_tokenizer(folder: Path, config: CogVLM2VideoConfig) -> PreTrainedTokenizerFast:
    """A checkpoint's tokenizer; padding, on the left, is the token that marks image positions.

    Only `bos_token` is taken from `tokenizer_config.json`: its other fields may name files and code.

    Raises:
        CheckpointError: files that are missing or damaged, or a tokenizer that does not fit the model.
    """
    settings, content = read_json(folder, "tokenizer_config.json"), read_json(folder, "tokenizer.json")
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    model = content.get("model")
    if not isinstance(bos, str):
        raise CheckpointError(folder, "tokenizer_config.json names no bos_token: fetch it again")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("dropout"):
        raise CheckpointError(folder, "tokenizer.json is damaged or not Llama-3's (its model is not plain BPE)")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if others := sorted({kind for kind in _kinds(content.get(part)) if kind not in (*PARTS, PATTERN)}):
            raise CheckpointError(folder, f"tokenizer.json is not Llama-3's: its {part} has {others[0]!r:.100}")
    try:
        backend = Tokenizer.from_str(read_file(folder, "tokenizer.json").decode())
        backend.no_padding()
        backend.no_truncation()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=bos,
            eos_token=backend.id_to_token(_first(config.eos_token_id)),
            pad_token=backend.id_to_token(config.video_token_id),
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        text = tokenizer.decode(ids, skip_special_tokens=True)
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics that are not even these
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(folder, f"tokenizer.json is damaged ({str(error)[:200]}): fetch it again") from error
    if text != PROBE:
        raise CheckpointError(folder, f"tokenizer.json is damaged (it turns {PROBE!r} into {text!r:.100})")
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    if max(tokenizer.get_vocab().values()) >= config.vocab_size or tokenizer.pad_token_id != config.video_token_id:
        raise CheckpointError(folder, "tokenizer.json does not fit config.json: fetch both again")
    if None in special or len(set(special)) < 3:
        raise CheckpointError(folder, f"the tokenizer's bos, eos and padding tokens have the ids {special}")
    return tokenizer


def _first(ids: int | list[int] | None) -> int:
    return ids[0] if isinstance(ids, list) else ids  # type: ignore[return-value]  # checked by read_config


def _kinds(part: Any) -> Iterator[Any]:
    """Types and regular expressions of a part of tokenizer.json, and of the parts in it."""
    parts = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for name, value in parts:
        if name in ("type", "Regex"):
            yield value
        else:
            yield from _kinds(value)
