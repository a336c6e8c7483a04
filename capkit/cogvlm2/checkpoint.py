"""Read a checkpoint's files, which may be damaged or hostile: each is checked before anything relies on it.

Read are config.json, the end tokens in generation_config.json, tokenizer.json, tokenizer_config.json, and safetensors
files with their index: no pickles, no code. They must be regular files; links are followed, as the hub's cache is made
of them. Names inside the files cannot lead out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from capkit.cogvlm2.configuration import CogVLM2VideoConfig

IGNORED_TENSORS = r"self_attn\.rotary_emb\.inv_freq$"
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
MAX_BYTES = {"tokenizer.json": 1 << 26}  # the published one has 9 MB
MAX_BYTES_ELSEWHERE = 1 << 22
MAX_SIZE = 2**31 - 1
HASHED_WHOLE = 1 << 24  # bytes; of larger tensors the fingerprint covers only parts of HASHED_PART bytes
HASHED_PART = 1 << 16


class CheckpointError(Exception):
    """A checkpoint that cannot be loaded.

    Attributes:
        checkpoint: its folder or name.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, checkpoint: str | os.PathLike, reason: str) -> None:
        super().__init__(checkpoint, reason)
        self.checkpoint, self.reason = str(checkpoint), reason

    def __str__(self) -> str:
        return f"{self.checkpoint}: {self.reason}"


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint under this name: a wrong argument, not a damaged checkpoint."""


def check_file(folder: Path, name: str, missing: str = "has no {}: fetch it again") -> Path:
    """The path of a regular file in a checkpoint's folder. Others would be waited for (pipes) or never end (devices).

    Raises:
        CheckpointError: missing (with that reason), unreachable, or of another kind.
    """
    path = folder / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(folder, missing.format(name)) from error
    except OSError as error:
        raise CheckpointError(folder, f"{name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(folder, f"{name} is not a regular file: fetch it again")
    return path


def read_file(folder: Path, name: str) -> bytes:
    """The content of a small file of a checkpoint.

    Raises:
        CheckpointError: as in `check_file`, or the file is too large to be what its name says.
    """
    path, limit = check_file(folder, name), MAX_BYTES.get(name, MAX_BYTES_ELSEWHERE)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(folder, f"{name} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise CheckpointError(folder, f"{name} is damaged (larger than {limit} bytes): fetch it again")
    return content


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: as in `read_file`, or the content is something else.
    """
    try:
        content = json.loads(read_file(folder, name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(folder, f"{name} is damaged ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(folder, f"{name} is damaged (not a JSON object): fetch it again")
    return content


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


Rule = tuple[str, Callable[[Any], bool]]
_SIZE: Rule = (f"a whole number from 1 to {MAX_SIZE}", lambda value: _is_whole(value, 1, MAX_SIZE))
_TOKEN: Rule = ("a token's id", lambda value: _is_whole(value, 0, MAX_SIZE))
_END_TOKENS: Rule = (
    "a token's id, or a list of them",
    lambda value: bool(value) and all(map(_TOKEN[1], value)) if isinstance(value, list) else _TOKEN[1](value),
)
_EPSILON: Rule = ("a number from 0 to 1", lambda value: _is_number(value, 0, 1))
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "num_multi_query_heads", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), _EPSILON),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _TOKEN),
    "eos_token_id": _END_TOKENS,
    "rope_theta": ("a number from 1 to 1e12", lambda value: _is_number(value, 1, 1e12)),
    "template_version": ("a text", lambda value: isinstance(value, str)),
    "hidden_act": ("'silu'", lambda value: value == "silu"),
    "tie_word_embeddings": ("false", lambda value: value is False),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters", "quantization_config"), ("left out", lambda value: value is None)
    ),
}
_VISION_RULES: dict[str, Rule] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "image_size"), _SIZE),
    **dict.fromkeys(("patch_size", "num_positions"), _SIZE),
    "in_channels": ("3", lambda value: value == 3),
    "hidden_act": ("'gelu'", lambda value: value == "gelu"),
    **dict.fromkeys(("layer_norm_eps", "dropout_prob"), _EPSILON),
}


def read_config(folder: Path) -> CogVLM2VideoConfig:
    """Read a checkpoint's `config.json`, and the end tokens from `generation_config.json` if there is one.

    Fields that the model does not have, and settings of generation, have no effect.

    Raises:
        CheckpointError: a file is missing or damaged, or describes another kind of model.
    """
    if not os.path.lexists(folder / "config.json"):
        raise CheckpointNotFound(folder, "has no config.json: give the folder of a checkpoint")
    content = read_json(folder, "config.json")
    vision = content.get("vision_config")
    if not isinstance(vision, dict) or "num_multi_query_heads" not in content:
        kind = content.get("architectures")
        raise CheckpointError(folder, f"config.json describes another kind of model ({kind!r:.100}), not CogVLM2-Video")
    fields = _checked(folder, "config.json", content, _RULES)
    vision = _checked(folder, "config.json", vision, _VISION_RULES, "vision_config.")
    if os.path.lexists(folder / "generation_config.json"):  # what transformers takes the end tokens from
        generation = read_json(folder, "generation_config.json")
        if generation.get("eos_token_id") is not None:
            fields |= _checked(folder, "generation_config.json", generation, {"eos_token_id": _END_TOKENS})
    try:
        config = CogVLM2VideoConfig(**fields, vision_config=vision)
    except Exception as error:  # whatever transformers does not like
        raise CheckpointError(folder, f"config.json holds an invalid value: {error}") from error
    if problem := _contradiction(config):
        raise CheckpointError(folder, f"config.json holds an invalid value: {problem}")
    return config


def _checked(
    folder: Path, file: str, content: dict[str, Any], rules: dict[str, Rule], prefix: str = ""
) -> dict[str, Any]:
    """The fields of a file's content that have rules, checked by these."""
    fields = {name: content[name] for name in rules if name in content}
    for name, value in fields.items():
        allowed, is_allowed = rules[name]
        if not is_allowed(value):
            raise CheckpointError(
                folder, f"{file} holds an invalid value: {prefix}{name}={value!r:.100}, must be {allowed}"
            )
    return {name: value for name, value in fields.items() if value is not None}


def _contradiction(config: CogVLM2VideoConfig) -> str | None:
    """What is wrong with a configuration whose fields are right one by one."""
    vision, ends = config.vision_config, config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]  # type: ignore[list-item]  # read_config refuses None
    grid = vision.image_size // vision.patch_size
    ids = [config.bos_token_id, *ends, config.pad_token_id]
    if not all(_is_whole(token, 0, config.vocab_size - 1) for token in ids):
        return f"tokens with the ids {ids!r:.100} (begin, end, padding) in a vocabulary of {config.vocab_size}"
    if config.pad_token_id in [config.bos_token_id, *ends]:
        return f"pad_token_id={config.pad_token_id}, must differ from bos_token_id and eos_token_id"
    for larger, smaller, whole, part in (
        ("hidden_size", "num_attention_heads", config.hidden_size, 2 * config.num_attention_heads),
        ("num_attention_heads", "num_multi_query_heads", config.num_attention_heads, config.num_key_value_heads),
        ("vision_config.hidden_size", "num_heads", vision.hidden_size, vision.num_heads),
    ):
        if whole % part:
            return f"{smaller} does not divide {larger}={whole}"
    if grid < 2 or vision.num_positions != grid**2 + 1:
        return f"vision_config.num_positions={vision.num_positions}, must fit image_size and patch_size"
    return None


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from the headers of the safetensors files.

    Raises:
        CheckpointError: weights missing, cut short, not safetensors, stored twice, or not of a floating point type.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():
                    tensor = shard.get_slice(name)
                    if name in shapes or tensor.get_dtype() not in DTYPES:
                        problem = "is in two files" if name in shapes else f"is of type {tensor.get_dtype()}"
                        raise CheckpointError(folder, f"tensor {name!r:.100} {problem}: fetch the checkpoint again")
                    shapes[name] = tuple(tensor.get_shape())
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            size = path.stat().st_size
            if size < 1000 and path.read_bytes().startswith(b"version"):
                reason = "is a git-lfs pointer, not the weights: run `git lfs pull` in the folder"
            else:
                reason = f"is cut short or damaged ({size} bytes; {str(error)[:200]}): fetch it again"
            raise CheckpointError(folder, f"{path.name} {reason}") from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    if os.path.lexists(folder / "adapter_config.json"):  # transformers would apply it, depending on what is installed
        raise CheckpointError(
            folder, "holds an adapter (adapter_config.json): merge it into the weights, or move it away"
        )
    if os.path.lexists(folder / "model.safetensors"):  # preferred to an index, as in transformers
        return [check_file(folder, "model.safetensors")]
    if not os.path.lexists(folder / INDEX):
        raise CheckpointError(folder, f"has no weights: neither {INDEX} nor model.safetensors is there")
    names = read_json(folder, INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(folder, f"{INDEX} is damaged (no weight_map): fetch it again")
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
            reason = f"{INDEX} names {name!r:.100}, which is not a safetensors file in the folder"
            raise CheckpointError(folder, f"{reason}: fetch the checkpoint again")
    missing = "{} is missing, though " + INDEX + " names it: fetch it again"
    return [check_file(folder, name, missing) for name in sorted(set(names.values()))]


def check_layers(folder: Path, config: CogVLM2VideoConfig) -> None:
    """Check the numbers of layers, before a model of as many is built.

    Raises:
        CheckpointError: as in `read_shapes`, or the weights have another number of layers than `config.json`.
    """
    shapes = read_shapes(folder)
    for prefix, name, number in (
        ("model.layers.", "num_hidden_layers", config.num_hidden_layers),
        (
            "model.vision.transformer.layers.",
            "vision_config.num_hidden_layers",
            config.vision_config.num_hidden_layers,
        ),
    ):
        layers = {key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)}
        if len(layers) != number:
            reason = f"config.json says {name}={number}, the weights have {len(layers)} layers"
            raise CheckpointError(folder, f"the weights do not fit config.json: {reason}")


def check_shapes(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint holds exactly the expected tensors, in their shapes.

    Raises:
        CheckpointError: naming the first tensors that are missing, unexpected or of another shape.
    """
    shapes = read_shapes(folder)
    unexpected = [name for name in shapes if name not in expected and not re.search(IGNORED_TENSORS, name)]
    if any("vision_expert" in name for name in unexpected):
        reason = "is the image model's checkpoint (it has vision experts); capkit runs the video and caption models"
        raise CheckpointError(folder, f"{reason}, such as THUDM/cogvlm2-llama3-caption")
    misshapen = [
        f"{name} (is {list(shapes[name])}, should be {list(shape)})"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    missing = [name for name in expected if name not in shapes]
    problems = [
        f"{len(names)} tensors {kind}: {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(folder, f"the weights do not fit config.json: {'; '.join(problems)}")


def fingerprint(folder: Path) -> str:
    """Digest of a model, 16 hexadecimal digits; the folder's name is not part of it.

    Covers what captions depend on: config.json, the end tokens, both tokenizer files and the weights. Of tensors above
    16 MiB only the beginning, middle and end: any retraining changes them, and reading all 25 GB would take longer than
    captioning a clip.

    Raises:
        CheckpointError: as in `read_config` and `read_shapes`.
    """
    digest = hashlib.sha256(f"end tokens {read_config(folder).eos_token_id}".encode())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = read_file(folder, name)
        digest.update(f"{name} {len(content)}".encode() + content)
    read_shapes(folder)  # from here on the headers can be relied on
    for path in _weight_files(folder):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            for name, tensor in sorted(header.items()):
                if name != "__metadata__":
                    digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                    first, end = tensor["data_offsets"]
                    is_small = end - first <= HASHED_WHOLE
                    parts = [first] if is_small else [first, (first + end) // 2, end - HASHED_PART]
                    for part in parts:
                        file.seek(start + part)
                        digest.update(file.read(end - first if is_small else HASHED_PART))
    return digest.hexdigest()[:16]
