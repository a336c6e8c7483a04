"""Find a checkpoint, check that it fits into memory, choose device and dtype; readable errors."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from capkit.cogvlm2.checkpoint import INDEX, CheckpointError, CheckpointNotFound
from capkit.console import progress_bar

_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
_WEIGHT_FILES = ["*.safetensors", INDEX]
QUANTIZED_DEVICES = ("cuda",)  # on some CPUs bitsandbytes fails, on all it is slow


def find(name_or_path: str | os.PathLike, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a checkpoint; from a name on the hub, configuration, tokenizer and weights are downloaded.

    Raises:
        CheckpointNotFound: neither a folder nor a name on the hub.
        CheckpointError: the download failed.
        ValueError: neither a text nor a path, or a revision of a folder.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ValueError(f"model={name_or_path!r}: must be a folder, or a name on the Hugging Face hub (owner/name)")
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if os.path.isdir(folder):  # unlike Path.is_dir, it takes names that are too long
        if revision is not None:
            raise ValueError(f"revision={revision!r}: has no effect on a folder ({folder}), only on a name on the hub")
        return folder
    if os.path.isfile(folder):
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
        bar: Any = progress_bar() if logging.is_progress_bar_enabled() else None
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=bar))
    except (OSError, ValueError) as error:  # the base class of all these, and names that the hub refuses
        matching = (reason for kind, reason in reasons if isinstance(error, kind))
        is_unknown = isinstance(error, (errors.RevisionNotFoundError, errors.RepositoryNotFoundError))
        kind_of_error = CheckpointNotFound if is_unknown else CheckpointError
        raise kind_of_error(name, next(matching, f"the download failed: {error}")) from error


@contextlib.contextmanager
def show_progress() -> Iterator[None]:
    """Context in which transformers' progress bars are capkit's."""

    def make(bar: Any, args: Any, kwargs: Any) -> Any:
        return (progress_bar() if logging.is_progress_bar_enabled() else bar)(*args, **kwargs)

    before = logging.set_tqdm_hook(make)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def check_memory(
    folder: Path,
    weights: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    through_cpu: bool = False,
) -> None:
    """Check before loading that the weights fit into the free memory of the device.

    Args:
        weights: by their published names, on any device (`meta` too).
        through_cpu: whether the CPU holds all of them before they go to the device, as without accelerate.

    Raises:
        CheckpointError: they do not fit.
    """
    needed = num_bytes(weights, dtype, quantization)
    for place in dict.fromkeys([torch.device("cpu"), device] if through_cpu else [device]):
        free = _free_bytes(place)
        if free is None or needed <= free:
            continue
        advice = ["a smaller dtype"] if dtype.itemsize > 2 else []
        if place.type != device.type:
            advice.insert(0, "installing accelerate, which loads straight to the GPU")
        elif device.type in QUANTIZED_DEVICES and quantization != "4bit":
            advice.append('quantization="4bit"' if quantization else 'quantization="8bit" or "4bit"')
        raise CheckpointError(
            folder,
            f"not enough memory: the weights take {needed / 1e9:.1f} GB as {quantization or dtype} and {place} has "
            f"{free / 1e9:.1f} GB free; try {', or '.join(advice or ['another device'])}",
        )


def num_bytes(weights: dict[str, torch.Tensor], dtype: torch.dtype, quantization: str | None) -> float:
    """Size of a loaded model's weights, given by their published names."""
    quantized = {None: dtype.itemsize, "8bit": 1, "4bit": 0.5 + 4 / 64}[quantization]  # nf4: a float32 for 64 weights
    return sum(
        tensor.numel() * (quantized if name.startswith("model.layers.") and tensor.ndim == 2 else dtype.itemsize)
        for name, tensor in weights.items()
    )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what was freed
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return None


@contextlib.contextmanager
def translate_errors(folder: Path, device: torch.device) -> Iterator[None]:
    """Context in which what libraries raise about a checkpoint, or about memory, becomes a `CheckpointError`."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, ValueError, KeyError, SafetensorError) as error:
        reason = f"cannot be loaded ({type(error).__name__}: {str(error)[:500]})"
        if is_out_of_memory(error):
            reason = f"not enough memory on {device}: free memory, choose another device, or set quantization"
        raise CheckpointError(folder, reason) from error


def check_finite(folder: Path, model: torch.nn.Module) -> None:
    """Check that no weight is NaN or infinite: captions would be nonsense.

    Raises:
        CheckpointError: naming the first tensor with such weights.
    """
    totals = {
        name: tensor.sum(dtype=torch.float32) for name, tensor in model.named_parameters() if tensor.is_floating_point()
    }
    finite = torch.stack([*totals.values()]).isfinite().tolist()  # one copy from the device
    if not all(finite):
        name = [*totals][finite.index(False)]
        raise CheckpointError(folder, f"tensor {name} has values that are NaN or infinite: fetch the weights again")


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


def quantization_config(quantization: str, dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """bitsandbytes' settings for "4bit" (nf4) or "8bit"; the vision tower and the head stay in `dtype`.

    Raises:
        ValueError: another quantization, or a device other than a CUDA GPU.
        ImportError: bitsandbytes or accelerate is not installed.
    """
    if quantization not in ("4bit", "8bit"):
        raise ValueError(f"quantization={quantization!r}: must be None, '4bit' or '8bit'")
    if device.type not in QUANTIZED_DEVICES:
        advice = "leave quantization out" + (', or set dtype="bfloat16"' if dtype.itemsize > 2 else "")
        raise ValueError(f"quantization={quantization!r}: needs a CUDA GPU, and the device is {device}; {advice}")
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
