"""Find a checkpoint, check it before its weights are read, choose device and dtype; readable errors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig

from capkit.cogvlm2.configuration import CogVLM2VideoConfig

IGNORED_TENSORS = r"self_attn\.rotary_emb\.inv_freq$"
_FILES = ["config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json"]
_WEIGHT_FILES = ["*.safetensors", "model.safetensors.index.json"]
_INDEX = "model.safetensors.index.json"


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


def find(name_or_path: str | os.PathLike, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a checkpoint; from a name on the hub, configuration, tokenizer and weights are downloaded.

    Raises:
        CheckpointNotFound: neither a folder nor a name on the hub.
        CheckpointError: the download failed.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointNotFound(name, "is a file: give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointNotFound(name, "no such folder, and not a name on the Hugging Face hub (owner/name)")
    from huggingface_hub import errors, snapshot_download

    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError)
    reasons = (  # the first three errors are HfHubHTTPErrors too, so that their order matters
        (errors.GatedRepoError, "log in to the hub and accept the model's licence first (huggingface-cli login)"),
        (errors.RevisionNotFoundError, f"is on the hub, but has no revision {revision!r}"),
        (errors.RepositoryNotFoundError, "no such folder, and no such name on the hub"),
        (
            unreachable,
            "no such folder, not downloaded before, and the Hugging Face hub cannot be reached: check the network, or "
            "download it elsewhere and give its folder",
        ),
    )
    try:
        patterns = _FILES + (_WEIGHT_FILES if weights else [])
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except OSError as error:  # the base class of all these
        matching = (reason for kind, reason in reasons if isinstance(error, kind))
        is_unknown = isinstance(error, (errors.RevisionNotFoundError, errors.RepositoryNotFoundError))
        kind_of_error = CheckpointNotFound if is_unknown else CheckpointError
        raise kind_of_error(name, next(matching, f"the download failed: {error}")) from error


def read_config(folder: Path) -> CogVLM2VideoConfig:
    """Read a checkpoint's `config.json`.

    Raises:
        CheckpointError: the file is missing or damaged, or describes another kind of model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFound(folder, "has no config.json: give the folder of a checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(folder, f"config.json is damaged ({error}): fetch it again") from error
    if not isinstance(config, dict) or "vision_config" not in config or "num_multi_query_heads" not in config:
        kind = config.get("architectures") if isinstance(config, dict) else None
        raise CheckpointError(folder, f"config.json describes another kind of model ({kind}), not CogVLM2-Video")
    config.pop("auto_map", None)  # names of remote code, which is never run
    try:
        return CogVLM2VideoConfig(**config)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(folder, f"config.json holds an invalid value: {error}") from error


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from the headers of the safetensors files.

    Raises:
        CheckpointError: weights missing, cut short, or not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise CheckpointError(folder, f"{path.name} is missing, though {_INDEX} names it: fetch it again")
        try:
            with safe_open(path, framework="pt") as shard:
                shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}
        except (SafetensorError, OSError) as error:
            if path.stat().st_size < 1000 and path.read_bytes().startswith(b"version"):
                reason = "is a git-lfs pointer, not the weights: run `git lfs pull` in the folder"
            else:
                reason = f"is cut short or damaged ({path.stat().st_size} bytes; {error}): fetch it again"
            raise CheckpointError(folder, f"{path.name} {reason}") from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():  # preferred to an index, as in transformers
        return [folder / "model.safetensors"]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(folder, f"has no weights: neither {_INDEX} nor model.safetensors is there")
    try:
        names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(folder, f"{_INDEX} is damaged ({error!r}): fetch it again") from error
    return [folder / name for name in sorted(names)]


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

    Covers config.json, tokenizer.json and the first 64 KiB of every tensor: any retraining changes them, and reading
    all 25 GB would take longer than captioning a clip.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    for path in _weight_files(folder):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            for name, tensor in sorted(header.items()):
                if name != "__metadata__":
                    digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                    first, end = tensor["data_offsets"]
                    file.seek(start + first)
                    digest.update(file.read(min(end - first, 65536)))
    return digest.hexdigest()[:16]


def check_memory(
    folder: Path, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype, quantization: str | None
) -> None:
    """Check before loading that the weights fit into the device's free memory.

    Args:
        weights: by their published names, on any device (`meta` too).

    Raises:
        CheckpointError: they do not fit.
    """
    quantized_size = {None: dtype.itemsize, "8bit": 1, "4bit": 0.5}[quantization]
    needed = sum(
        tensor.numel() * (quantized_size if name.startswith("model.layers.") and tensor.ndim == 2 else dtype.itemsize)
        for name, tensor in weights.items()
    )
    free = _free_bytes(device)
    if free is not None and needed > free:
        advice = "a smaller dtype" if dtype.itemsize > 2 else "another device"
        if device.type == "cuda" and quantization is None:
            advice += ', or quantization="8bit" or "4bit"'
        raise CheckpointError(
            folder,
            f"not enough memory: the weights take {needed / 1e9:.1f} GB as {quantization or dtype} and {device} has "
            f"{free / 1e9:.1f} GB free; try {advice}",
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return None


@contextlib.contextmanager
def translate_oom_errors(folder: Path, device: torch.device) -> Iterator[None]:
    """Context in which running out of memory is raised as a `CheckpointError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"not enough memory on {device}: free memory, choose another device, or set quantization"
        raise CheckpointError(folder, reason) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the CPU's or the GPU's memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    messages = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the CPU allocator's, CUDA's, cuBLAS's
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def choose_device(device: str | torch.device) -> torch.device:
    """A device by name; "auto" is a CUDA GPU where there is one, else the CPU.

    Raises:
        ValueError: unknown device, or one that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: must be 'auto', 'cpu', 'cuda' or 'cuda:<number>'") from error
    if chosen.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=chosen).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device={str(chosen)!r}: cannot be used on this machine") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(chosen)!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto" is bfloat16 on GPUs that have it, float16 on older ones, float32 (fastest) on the CPU.

    Raises:
        ValueError: not a floating point type that the model runs in.
    """
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float16
    if (name := str(dtype).removeprefix("torch.")) not in allowed:
        raise ValueError(f"dtype={dtype!r}: must be 'auto', {', '.join(map(repr, allowed))}")
    return allowed[name]


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings for "4bit" (nf4) or "8bit"; the vision tower and the head stay in `dtype`.

    Raises:
        ValueError: another quantization.
        ImportError: bitsandbytes or accelerate is not installed.
    """
    if quantization not in ("4bit", "8bit"):
        raise ValueError(f"quantization={quantization!r}: must be None, '4bit' or '8bit'")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"quantization={quantization!r} needs {package}: pip install -e '.[quantize]'")
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision", "lm_head"],  # full prefixes: "vision" alone skips nothing
    )
