"""Append-only JSONL store of captions: latest record per request, resume, recovery from partial lines."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from capkit import __version__
from capkit.captioning import GREEDY, Caption, Captioner, Decoding
from capkit.cogvlm2 import Prompt, PromptLike, pixels_to_frames, preprocess_frames
from capkit.files import append_line, atomic_write, file_sha256, now, read_lines
from capkit.video import Clip, FrameSampling, FrameSamplingLike

STRIP_FRAME_PIXELS = 112  # half of what the published model sees: a strip of 24 frames is about 25 KB
STRIP_COLUMNS = 12
STRIP_GAP_PIXELS = 2


class CaptionStore:
    """A file of caption records (JSON Lines) with picture strips beside it. One process writes, any number read.

    Every line is an attempt at a request: a video with all settings that affect its caption. The latest one counts.
    A process killed while writing leaves a partial line. Readers skip it; the next `append` moves it to `<name>.torn`,
    with a warning.

    Args:
        path: the file, such as `runs/captions.jsonl`; its folder is made with the first record.
        strips: folder of the picture strips; None: `<name>_strips/` beside the file. Several stores may share one.
    """

    def __init__(self, path: str | os.PathLike[str], strips: str | os.PathLike[str] | None = None):
        self.path = Path(path).expanduser()
        self.strips = self.path.with_name(self.path.stem + "_strips") if strips is None else Path(strips).expanduser()
        self._checked = False

    def __repr__(self) -> str:
        return f"CaptionStore({str(self.path)!r})"

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, flushed to disk.

        Raises:
            ValueError: the record has no `request`, or holds what JSON cannot.
        """
        if "request" not in record and "edits" not in record:
            raise ValueError("a record needs its `request`: make it with new_record()")
        if not self._checked:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._move_partial_line()
            self._checked = True
        append_line(self.path, record)

    def _move_partial_line(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end == len(content):
                return
            torn = self.path.with_name(self.path.name + ".torn")
            with open(torn, "ab") as aside:
                aside.write(content[end:] + b"\n")
            file.truncate(end)
        warnings.warn(f"{self.path}: the last line was torn (a process was killed); it is now in {torn}", stacklevel=3)

    def lines(self) -> list[dict[str, Any]]:
        """All attempts and edits, in file order. An unreadable line is skipped with a warning."""
        return list(read_lines(self.path))

    def current(self) -> list[dict[str, Any]]:
        """The latest attempt at each request, in the order in which requests were first tried.

        A caption stopped by hand (`finish_reason` "stopped") counts only if there is no complete one. A hand edit of a
        request is in `edited_text`; `text` stays the model's.
        """
        latest: dict[str, dict[str, Any]] = {}
        edits = {}
        for line in self.lines():
            if "edits" in line:
                edits[line["edits"]] = {"edited_text": line["text"]}
            elif "request" in line:
                before = latest.get(line["request"], line)
                if not is_stopped(line) or is_stopped(before) or before["status"] != "ok":
                    latest[line["request"]] = line
        return [record | edits.get(request, {}) for request, record in latest.items()]

    def done(self, retry_errors: bool = False) -> set[str]:
        """Requests with a complete caption or, unless `retry_errors`, with an error."""
        complete = (record for record in self.current() if not is_stopped(record))
        return {record["request"] for record in complete if record["status"] == "ok" or not retry_errors}

    def edit(self, request: str, text: str) -> None:
        """Store a text written by hand for a request. No rerun overwrites it.

        Raises:
            ValueError: the store has no such request.
        """
        if all(line.get("request") != request for line in self.lines()):
            raise ValueError(f"{self.path} has no request {request!r} to edit")
        self.append({"edits": request, "text": text, "created": now()})

    def strip_path(self, record: dict[str, Any]) -> Path:
        """Path of a record's picture strip; captions of the same frames share one."""
        return self.strips / record["strip"]

    def save_strip(self, record: dict[str, Any], clip: Clip, image_size: int) -> Path:
        """Write a small picture of the frames as the model saw them: cropped, in reading order, 12 to a row."""
        path = self.strip_path(record)
        if path.exists():
            return path
        seen = pixels_to_frames(preprocess_frames(clip.frames, image_size))
        side, columns = STRIP_FRAME_PIXELS, min(len(seen), STRIP_COLUMNS)
        pitch, rows = side + STRIP_GAP_PIXELS, -(-len(seen) // columns)
        strip = Image.new("RGB", (columns * pitch - STRIP_GAP_PIXELS, rows * pitch - STRIP_GAP_PIXELS), "white")
        for index, frame in enumerate(seen):
            small = Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS)
            strip.paste(small, (index % columns * pitch, index // columns * pitch))
        picture = io.BytesIO()
        strip.save(picture, "webp", quality=60)
        return atomic_write(path, picture.getvalue())


@dataclass(frozen=True)
class ModelIdentity:
    """What a request needs to know of a model that is not loaded in this process; attributes as of `Captioner`."""

    name: str
    fingerprint: str
    dtype: str
    quantization: str | None


def request_settings(
    captioner: Captioner | ModelIdentity,
    video: str | os.PathLike[str],
    prompt: PromptLike,
    decoding: Decoding = GREEDY,
    frame_sampling: FrameSamplingLike = "chat",
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    sample: int = 0,
    own_text: str | None = None,
) -> dict[str, Any]:
    """The first part of a record: all settings of a request and, as `request`, their digest, by which runs resume.

    The digest identifies the video by path, size and modification time, so that it need not be opened, and the model
    by its weights' fingerprint, dtype and quantization, not by its name.

    Args:
        video: file name; need not exist.
        sample: number among repeats of the same request.
        own_text: replaces the text of the prompt; checked only when the clip is read, so that only this clip fails.
    """
    path = Path(video).expanduser().absolute()
    frames = {
        "video": str(path),
        "frame_sampling": FrameSampling.of(frame_sampling).to_dict(),
        "start_seconds": float(start_seconds),
        "end_seconds": None if end_seconds is None else float(end_seconds),
    }
    settings = Prompt.of(prompt).to_record() | ({} if own_text is None else {"prompt": own_text})
    settings |= {
        "decoding": decoding.to_dict(),
        "sample": sample,
        "model_fingerprint": captioner.fingerprint,
        "dtype": captioner.dtype,
        "quantization": captioner.quantization,
    }
    file = [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None
    names = {"model": captioner.name, "strip": f"{_digest([frames, file])}.webp"}
    return {"request": _digest([frames, file, settings])} | frames | settings | names


def new_record(settings: dict[str, Any], outcome: Caption | Exception, clip: Clip | None = None) -> dict[str, Any]:
    """A record: the request with its caption or error.

    Args:
        settings: from `request_settings`; with `video_sha256` if already computed.
        outcome: the caption, or the error instead of it.
        clip: the frames that were seen, if it was read.
    """
    names = ("video_sha256", "duration_seconds", "frame_indices", "timestamps_seconds", "video_notes")
    record = settings | dict.fromkeys(names)
    if clip is not None:
        end = clip.info.duration_seconds if clip.end_seconds is None else clip.end_seconds
        record["duration_seconds"] = round(min(end, clip.info.duration_seconds) - clip.start_seconds, 3)
        record["frame_indices"] = list(clip.frame_indices)
        record["timestamps_seconds"] = np.asarray(clip.timestamps_seconds).round(6).tolist()
        record["video_notes"] = clip.info.notes
    if isinstance(outcome, Caption):
        record |= {
            "video_sha256": settings.get("video_sha256") or sha256_if_there(settings["video"]),
            "text": outcome.text,
            "num_tokens": len(outcome.token_ids),
            "mean_logprob": round(outcome.mean_logprob, 6),
            "finish_reason": outcome.finish_reason,
            "seconds": round(outcome.seconds, 4),
            "status": "ok",
            "error": None,
        }
    else:
        empty = ("text", "num_tokens", "mean_logprob", "finish_reason", "seconds")
        record |= dict.fromkeys(empty) | {"status": "error", "error": str(outcome) or repr(outcome)}
    return record | {"capkit_version": __version__, "created": now()}


def is_stopped(record: dict[str, Any]) -> bool:
    """Whether a person stopped the caption before its end."""
    return record.get("finish_reason") == "stopped"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def sha256_if_there(path: str) -> str | None:
    """The file's SHA-256, or None if it is gone since it was read: its caption is still worth keeping."""
    try:
        return file_sha256(path)
    except OSError:
        return None


RECORD_FIELDS = tuple(new_record(request_settings(ModelIdentity("", "", "", None), os.sep, Prompt()), ValueError()))
"""The fields of every record. Some have `reference` too, and `edited_text` in `CaptionStore.current`."""
