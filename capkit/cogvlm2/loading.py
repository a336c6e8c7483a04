"""Loading: find a checkpoint, check it before anything large is read, choose device and dtype; faults in words."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
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
    """A checkpoint that cannot be loaded: which one, why, and what to do.

    Attributes:
        checkpoint: the folder or name.
        reason: what is wrong with it.
    """

    def __init__(self, checkpoint: str | os.PathLike, reason: str):
        super().__init__(checkpoint, reason)
        self.checkpoint, self.reason = str(checkpoint), reason

    def __str__(self) -> str:
        return f"{self.checkpoint}: {self.reason}"


def find(name_or_path: str | os.PathLike, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a checkpoint; a name on the hub is downloaded, its configuration, tokenizer and weights only.

    Raises:
        CheckpointError: neither a folder nor a name that the hub knows, or the hub is out of reach.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if folder.is_file():
        raise CheckpointError(name, "is a file: give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(name, "no such folder, and no name on the Hugging Face hub either (owner/name)")
    from huggingface_hub import errors, snapshot_download

    try:
        patterns = _FILES + (_WEIGHT_FILES if weights else [])
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        reason = "the hub wants you to log in and to accept its licence first (huggingface-cli login)"
        raise CheckpointError(name, reason) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(name, f"the hub knows the name, but no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(name, "no such folder here, and the hub knows no such name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        reason = (
            "no such folder here, not downloaded before, and the Hugging Face hub cannot be reached: check the "
            "network, or download it elsewhere and give its folder"
        )
        raise CheckpointError(name, reason) from error
    except OSError as error:
        raise CheckpointError(name, f"the download failed: {error}") from error


def read_config(folder: Path) -> CogVLM2VideoConfig:
    """The configuration in a folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it is another kind of model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(folder, "has no config.json: this is not a checkpoint's folder")
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
        raise CheckpointError(folder, f"config.json holds a value that makes no sense: {error}") from error


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from the headers of the safetensors files; damaged files are found here, in words.

    Raises:
        CheckpointError: weights missing, cut short, or not safetensors.
    """
    shapes = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise CheckpointError(folder, f"{path.name} is missing, though {_INDEX} names it: fetch it again")
        try:
            with safe_open(path, framework="pt") as shard:
                shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}
        except (SafetensorError, OSError) as error:
            if path.read_bytes()[:7] == b"version" and path.stat().st_size < 1000:
                reason = "is a git-lfs pointer, not the weights: run `git lfs pull` in the folder"
            else:
                reason = f"is cut short or damaged ({path.stat().st_size} bytes; {error}): fetch it again"
            raise CheckpointError(folder, f"{path.name} {reason}") from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():  # transformers takes it before an index, which may be a relic
        return [folder / "model.safetensors"]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(folder, f"has no weights: neither {_INDEX} nor model.safetensors is there")
    try:
        names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(folder, f"{_INDEX} is damaged ({error!r}): fetch it again") from error
    return [folder / name for name in sorted(names)]


def compare(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those expected.

    Raises:
        CheckpointError: naming the first tensors that are missing, unexpected or of another shape.
    """
    found = read_shapes(folder)
    unexpected = [name for name in found if name not in expected and not re.search(IGNORED_TENSORS, name)]
    if any("vision_expert" in name for name in unexpected):
        reason = "is the image model's checkpoint (it has vision experts); capkit runs the video and caption models"
        raise CheckpointError(folder, f"{reason}, such as THUDM/cogvlm2-llama3-caption")
    missing = [name for name in expected if name not in found]
    misshapen = [
        f"{name} (is {list(found[name])}, should be {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen}
    told = [f"{len(names)} tensors {kind}: {_first(names)}" for kind, names in problems.items() if names]
    if told:
        raise CheckpointError(folder, f"the weights do not fit config.json: {'; '.join(told)}")


def _first(names: list[str], count: int = 4) -> str:
    return ", ".join(sorted(names)[:count]) + (", ..." if len(names) > count else "")


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that tell one model from another, whatever its folder is called.

    Covers config.json, tokenizer.json and the first 64 KiB of every tensor, which any retraining changes: reading 25 GB
    through each time would take longer than captioning a clip.
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
    """Refuse before reading 25 GB for nothing. `weights` by their published names, on any device.

    Raises:
        CheckpointError: the weights alone need more than is free.
    """
    small = {None: dtype.itemsize, "8bit": 1, "4bit": 0.5}[quantization]
    needed = sum(
        tensor.numel() * (small if name.startswith("model.layers.") and tensor.ndim == 2 else dtype.itemsize)
        for name, tensor in weights.items()
    )
    free = _free_bytes(device)
    if free is not None and needed > free:
        advice = "a smaller dtype" if dtype.itemsize > 2 else "another device"
        if device.type == "cuda" and quantization is None:
            advice += ', or quantization="8bit" or "4bit"'
        raise CheckpointError(
            folder,
            f"no room in memory: the weights take {needed / 1e9:.1f} GB as {quantization or dtype} and {device} has "
            f"{free / 1e9:.1f} GB free; try {advice}",
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return None


@contextlib.contextmanager
def memory_errors_in_words(folder: Path, device: torch.device):
    """Turn an allocation that fails inside into a `CheckpointError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"no room in memory on {device}: free some, take another device, or set quantization"
        raise CheckpointError(folder, reason) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the CPU's or the GPU's memory ran out."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the CPU's, CUDA's, cuBLAS's
    told = any(word in str(error) for word in words)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and told)


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is a CUDA GPU where there is one, else the CPU.

    Raises:
        ValueError: unknown, or not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: must be 'auto', 'cpu', 'cuda', 'cuda:1' or the like") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return device


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on GPUs that have it, float16 on older ones, float32 on the CPU, where it is the fastest.

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


def quantization_config(quantization: str, dtype: torch.dtype):
    """bitsandbytes' settings for "4bit" (nf4) or "8bit"; the vision tower and the head stay in `dtype`.

    Raises:
        ValueError: neither of the two.
        ImportError: bitsandbytes or accelerate is not installed.
    """
    if quantization not in ("4bit", "8bit"):
        raise ValueError(f"quantization={quantization!r}: must be None, '4bit' or '8bit'")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"quantization={quantization!r} needs {package}: pip install 'capkit[quantize]'")
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision", "lm_head"],  # full prefixes: "vision" alone skips nothing
    )
