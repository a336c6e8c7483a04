"""Features of frames, kept in memory and on disk: the vision tower sees each frame alone, so once is enough."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from capkit.files import atomic_write
from capkit.text import warn

MEMORY_BYTES = 2**30  # of the published model: some 2,000 frames, or 80 clips
DISK_BYTES = 50 * 2**30
KEPT_SHARE = 0.9  # of the limit on disk, once it was exceeded


class FrameFeatures:
    """A model's features of frames by their pixels: the latest ones in memory and, with a folder, all of them on disk.

    Several threads and processes may use one folder. A damaged or unreadable file counts as missing; if a file cannot
    be written, one warning says so and the features stay in memory only. After a change of the weights, nothing is
    taken from here any more.

    Args:
        vision: the vision tower, whose weights are watched.
        folder: where `<digest>.safetensors` files are kept, one a frame, below a folder for the model; None: nowhere.
        model: what distinguishes the model from others, such as its fingerprint and dtype.
        memory_bytes: most memory to use; None: a tenth of what is free, at most 1 GiB.
        disk_bytes: most disk to use for this model; the files that were not used for the longest time are deleted.

    Attributes:
        num_encoded, num_from_memory, num_from_disk: frames that were asked for, by where their features came from.
    """

    def __init__(
        self,
        vision: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        model: str = "",
        memory_bytes: int | None = None,
        disk_bytes: int = DISK_BYTES,
    ) -> None:
        self._vision, self._weights = vision, _weights_of(vision)
        self.folder = None if folder is None else Path(folder).expanduser() / model
        free = min(psutil.virtual_memory().available // 10, MEMORY_BYTES)
        self.memory_bytes, self.disk_bytes = free if memory_bytes is None else memory_bytes, disk_bytes
        self.num_encoded = self.num_from_memory = self.num_from_disk = 0
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._num_held_bytes, self._num_disk_bytes, self._lock = 0, -1, threading.Lock()

    def __call__(self, pixels: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features (N, tokens, D) of frames (N, 3, S, S); `encode` computes those that are not kept."""
        if self._weights != _weights_of(self._vision):
            return encode(pixels)
        keys = [hashlib.sha256(frame.contiguous().numpy().data).hexdigest()[:40] for frame in pixels.float().cpu()]
        found = {key: features for key in dict.fromkeys(keys) if (features := self._find(key)) is not None}
        missing = {key: place for place, key in enumerate(keys) if key not in found}
        if missing:
            new = encode(pixels[list(missing.values())])
            for key, features in zip(missing, new.cpu(), strict=True):
                self._keep(key, features)
            found |= zip(missing, new, strict=True)
            self.num_encoded += len(missing)
        return torch.stack([found[key].to(pixels.device) for key in keys])

    def _find(self, key: str) -> torch.Tensor | None:
        with self._lock:
            if (features := self._held.get(key)) is not None:
                self._held.move_to_end(key)
                self.num_from_memory += 1
                return features
        if self.folder is None or (features := _read(_path(self.folder, key))) is None:
            return None
        self._hold(key, features)
        self.num_from_disk += 1
        return features

    def _keep(self, key: str, features: torch.Tensor) -> None:
        self._hold(key, features.clone())  # a view would hold the features of all frames
        if self.folder is None:
            return
        content = save({"features": features.contiguous()}, {"sha256": _digest(features)})
        try:
            atomic_write(
                _path(self.folder, key), content, durable=False
            )  # a file that a power cut damages counts as missing
            self._limit_disk(self.folder, len(content))
        except OSError as error:
            warn(f"features are kept in memory only: {error}", stacklevel=2)
            self.folder = None

    def _hold(self, key: str, features: torch.Tensor) -> None:
        with self._lock:
            if key in self._held or features.nbytes > self.memory_bytes:
                return
            self._held[key] = features
            self._num_held_bytes += features.nbytes
            while self._num_held_bytes > self.memory_bytes:
                self._num_held_bytes -= self._held.popitem(last=False)[1].nbytes

    def _limit_disk(self, folder: Path, num_new_bytes: int) -> None:
        """Delete the files that were not used for the longest time, if all take more than `disk_bytes`."""
        if self._num_disk_bytes >= 0:
            self._num_disk_bytes += num_new_bytes
            if self._num_disk_bytes <= self.disk_bytes:
                return
        files = []
        for path in folder.glob("*/*.safetensors"):
            with suppress(OSError):  # another process may delete files, too
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        if total > self.disk_bytes:
            for _, size, path in sorted(files):
                with suppress(OSError):
                    path.unlink()
                total -= size
                if total <= KEPT_SHARE * self.disk_bytes:
                    break
        self._num_disk_bytes = total


def _path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _weights_of(module: nn.Module) -> list[tuple[int, int]]:
    """Place and number of changes in place of each weight."""
    return [(weight.data_ptr(), weight._version) for weight in module.parameters()]


def _read(path: Path) -> torch.Tensor | None:
    """The features in a file, which is marked as used; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            features, digest = file.get_tensor("features"), (file.metadata() or {}).get("sha256")
        os.utime(path)
    except (OSError, SafetensorError):
        return None
    return features if digest == _digest(features) else None


def _digest(features: torch.Tensor) -> str:
    return hashlib.sha256(features.contiguous().view(torch.uint8).numpy().data).hexdigest()
