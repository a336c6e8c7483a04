"""Append-only JSONL store of captions: latest record per request, resume, hand edits, marks, picture strips."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capkit import __version__
from capkit.captioning import GREEDY, Caption, Captioner, Decoding, demo_notice
from capkit.cogvlm2 import Prompt, PromptLike, pixels_to_frames, preprocess_frames
from capkit.files import Busy, append_lines, atomic_write, hold_lock, now
from capkit.runs.digests import sha256_if_there
from capkit.runs.fields import clip_seconds, fill
from capkit.runs.index import Records, StoreIndex, record_text
from capkit.runs.lines import MARKS, MAX_LINE_BYTES, MAX_TEXT_CHARACTERS, check_line, read_store
from capkit.text import encodable
from capkit.video import Clip, FrameSampling, FrameSamplingLike, draw_strip, strip_frames

if TYPE_CHECKING:
    import pandas as pd

OF_A_SHARD = re.compile(r"shard-\d+-of-\d+|ray-[0-9a-f]{32}")  # names of stores that share the merged one's strips
MOST_STRIP_BYTES, MOST_STRIP_PIXELS = 2**24, 2**26  # that are shown: of some 5,000 frames


class StoreBusy(Busy):
    """Another run is captioning into this store."""

    advice = "is captioning into this store; wait for it, end it, or use another store"


class CaptionStore:
    """A file of caption records (JSON Lines) with picture strips beside it.

    Every line is an attempt at a request: a video with all settings that affect its caption; or what a person did by
    hand: an edit of its text, or a mark. The latest attempt counts, an error or a stopped caption only if there is no
    complete one. Processes and threads of one machine may write at the same time. A killed process may leave part of a
    line. Readers skip it, as they do any line that is no record, with a warning that names file and line; what is
    appended begins on a line of its own.

    Records stay in the file; of each request the store keeps where its record is (0.2 GB for a million), and reads only
    what was added since.

    Args:
        path: the file, such as `runs/captions.jsonl`, whose folder is made with the first record; or a folder, for the
            `captions.jsonl` in it.
        strips: folder of the picture strips; None: `<name>_strips/` beside the file, or of a shard's store
            `captions_strips/`. Several stores may share one.

    Attributes:
        index: where each record, hand edit and mark is in the file.
    """

    def __init__(self, path: str | os.PathLike[str], strips: str | os.PathLike[str] | None = None):
        self.path = Path(path).expanduser()
        if os.fspath(path) and (self.path / "captions.jsonl").is_file():
            self.path /= "captions.jsonl"
        if not self.path.name:
            raise ValueError(f"store={os.fspath(path)!r}: names no file; give one, such as runs/captions.jsonl")
        name = "captions" if OF_A_SHARD.fullmatch(self.path.stem) else self.path.stem
        self.strips = self.path.with_name(f"{name}_strips") if strips is None else Path(strips).expanduser()
        self.index = StoreIndex(self.path)
        self._num_bytes = 0  # of the file after the last `append`

    @classmethod
    def of(cls, store: CaptionStoreLike) -> CaptionStore:
        """A `CaptionStore` from a `CaptionStore` or its path."""
        return store if isinstance(store, cls) else cls(store)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"CaptionStore({str(self.path)!r})"

    @contextmanager
    def hold(self, error: type[Busy] = StoreBusy) -> Iterator[None]:
        """Keep other runs out until the block or the process ends. Hand edits and single captions still go in.

        Raises:
            StoreBusy: another run, in this process or another, holds the store; or `error` instead.
        """
        if self.path.exists() and not os.access(self.path, os.W_OK):
            yield  # for a run that finds everything done; one that does not fails at its first record
            return
        with hold_lock(Path(os.path.realpath(self.path)), error):
            yield

    def append(self, record: dict[str, Any], *more: dict[str, Any]) -> None:
        """Add lines, flushed to disk.

        Raises:
            ValueError: the record has no `request`, or holds what readers would refuse.
            OSError: the file cannot be written, or was deleted or replaced by a shorter one since it was last read or
                written here.
        """
        for line in (record, *more):
            check_line(line)
            if len(json.dumps(line)) > MAX_LINE_BYTES:
                raise ValueError(f"a record must have less than {MAX_LINE_BYTES:,} bytes")
        if num_bytes := max(self._num_bytes, self.index.size):
            now_there = self.path.stat().st_size if self.path.exists() else 0
            if now_there < num_bytes:
                self._num_bytes = 0
                self.index.refresh()
                change = "was replaced by a shorter file" if now_there else "was deleted or moved"
                raise OSError(f"{self.path}: {change} while it was in use; what it held is no longer there")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._num_bytes = append_lines(self.path, record, *more)

    def lines(self) -> list[dict[str, Any]]:
        """All attempts, and what was done by hand, in file order; `current` needs less memory."""
        try:
            return [line.record for line in read_store(self.path) if line.record is not None]
        except FileNotFoundError:
            return []

    def current(self) -> Records:
        """The current record of each request, in the order in which requests were first tried, read when it is used.

        Of requests that differ only in the video's size or modification time the last one with a complete caption is
        kept, or else the last: the file was replaced since. The error of a manifest's row that cannot be used is left
        out once a later run has captioned its video with the same settings: the row was mended. A hand edit of a
        request is in `edited_text`, also when the file was written again with the same content; `text` stays the
        model's. A mark is in `mark` ("right", "wrong", "unsure"), `wrong_words` and `remark`; once the text has changed
        since, `mark` is "outdated": it is of another text, and counts no longer.
        """
        self._num_bytes = 0
        return self.index.current()

    def latest(self, requests: Iterable[str]) -> Records:
        """The current record of each of these requests that the store has, also of videos that were replaced since."""
        self._num_bytes = 0
        return self.index.latest(requests)

    def done(self, retry_errors: bool = False) -> set[str]:
        """Requests with a complete caption or, unless `retry_errors`, with an error."""
        self._num_bytes = 0
        return self.index.done(retry_errors)

    def edit(self, request: str, text: str) -> None:
        """Store a text written by hand for a request. No rerun overwrites it.

        Raises:
            ValueError: the store has no such request.
        """
        if request not in self.index:
            raise ValueError(f"{self.path} has no request {request!r:.100} to edit")
        self.append({"edits": request, "text": text, "created": now("microseconds")})

    def mark(
        self, caption: str | dict[str, Any], mark: str | None, words: str | Iterable[str] = (), remark: str = ""
    ) -> None:
        """Store what a person finds of a caption. The latest mark of a request counts, as long as its text stays.

        Args:
            caption: the record, whose text is the one that is marked; or its request, for the current text.
            mark: "right", "wrong" or "unsure"; None takes the mark away.
            words: words or phrases of the text that are wrong, or one of them.
            remark: any text.

        Raises:
            ValueError: an unknown mark, words that are not in the text, no such request, or no caption to mark.
        """
        record = caption if isinstance(caption, dict) else next(iter(self.latest([caption])), {})
        request = record.get("request", caption)
        if request not in self.index:
            raise ValueError(f"{self.path} has no request {request!r} to mark")
        if not (text := record_text(record)):
            reason = record.get("error") or "its text is empty"
            raise ValueError(f"{self.path}: request {request!r} has no caption to mark: {reason}")
        if mark not in (None, *MARKS):
            raise ValueError(f"mark={mark!r}: must be one of {', '.join(map(repr, MARKS))}, or None for no mark")
        words = [words] if isinstance(words, str) else list(words)
        if not all(isinstance(text, str) for text in (*words, remark)):
            raise ValueError(f"words={words!r}, remark={remark!r}: must be texts")
        words = [" ".join(word.split()) for word in words if word.strip()]
        if words and mark in (None, "right"):
            raise ValueError(f"words={words!r}: are for captions that are wrong, and mark={mark!r}")
        for word in words:
            if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", " ".join(text.split()), re.IGNORECASE):
                raise ValueError(f"words: {word!r} is not in the caption")
        line = {"marks": request, "mark": mark, "wrong_words": words, "remark": remark.strip(), "text": text}
        self.append(line | {"created": now("microseconds")})

    def strip_path(self, record: dict[str, Any]) -> Path:
        """Path of a record's picture strip; captions of the same frames share one."""
        return self.strips / record["strip"]

    def read_strip(self, record: dict[str, Any]) -> bytes:
        """The picture strip of a record, as WebP. Its file is checked, because a store may come from anyone.

        Raises:
            ValueError: the reason why it is not shown: it is missing, or no strip as `save_strip` writes them.
        """
        name = record.get("strip")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+\.webp", name, re.ASCII):
            raise ValueError(f"{name!r} is not the name of a picture strip")
        path = self.strips / name
        if self.strips.is_symlink():
            raise ValueError(f"{self.strips} is a link; open the store with CaptionStore(path, strips=<its folder>)")
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is not a regular file")
            if status.st_size > MOST_STRIP_BYTES:
                raise ValueError(f"{path} has {status.st_size} bytes, which no picture strip has")
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        # RIFF....WEBPVP8 , and a key frame with its size: https://datatracker.ietf.org/doc/html/rfc9649
        header = re.match(rb"RIFF.{4}WEBPVP8 .{7}\x9d\x01\x2a(..)(..)", data, re.DOTALL)
        if header is None:
            raise ValueError(f"{path} is not a WebP picture as capkit writes them")
        width, height = (int.from_bytes(side, "little") & 0x3FFF for side in header.groups())
        if not 0 < width * height <= MOST_STRIP_PIXELS:
            raise ValueError(f"{path} has {width} x {height} pixels, which no picture strip has")
        return data

    def notice(self, record: dict[str, Any]) -> str:
        """What to say beside a caption, by its picture strip; see `demo_notice`."""
        if record.get("model") != "demo" or record.get("status") != "ok":
            return ""  # without reading the picture
        try:
            frames = strip_frames(self.read_strip(record), len(record.get("frame_indices") or [0]))
        except (OSError, ValueError):  # views say why there is no picture
            return ""
        return demo_notice("demo", frames)

    def save_strip(self, record: dict[str, Any], clip: Clip, image_size: int) -> Path:
        """Write a small picture of the frames as the model saw them: cropped, in reading order, 12 to a row.

        Raises:
            OSError: it cannot be written; names the store where its folder was taken away meanwhile.
        """
        path = self.strip_path(record)
        if path.exists():
            return path
        strip = clip.seen.strip if clip.seen else None
        strip = strip or draw_strip(pixels_to_frames(preprocess_frames(clip.frames, image_size)))
        try:
            return atomic_write(path, strip)
        except FileNotFoundError as error:  # `atomic_write` had made the folder
            raise FileNotFoundError(f"{self.path}: {self.strips} was deleted or moved while it was in use") from error


CaptionStoreLike = CaptionStore | str | os.PathLike[str]
"""What `CaptionStore.of` takes."""


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
    error: str | None = None,
    columns: Mapping[str, Any] | None = None,
    only_frames: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The first part of a record: all settings of a request and, as `request`, their digest, by which runs resume.

    The digest identifies the video by path, size and modification time, so that it need not be opened, and the model
    by its weights' fingerprint, dtype and quantization, not by its name.

    Args:
        video: file name; need not exist.
        sample: number among repeats of the same request.
        own_text: replaces the text of the prompt; checked only when the clip is read, so that only this clip fails.
        error: why the clip is not to be read; its record will have this error.
        columns: values of the prompt's fields by name, as of `Item.values`, beside those that the video's path gives.
        only_frames: as of `Item`.

    Raises:
        ValueError: a field of the prompt cannot be filled, see `capkit.runs.fields`.
    """
    path = Path(os.path.expanduser(video)).absolute()
    is_address = error is not None and "://" in str(video)
    frames = {
        "video": str(video if is_address else path),
        "frame_sampling": FrameSampling.of(frame_sampling).to_dict(),
        "start_seconds": float(start_seconds),
        "end_seconds": None if end_seconds is None else float(end_seconds),
    } | ({} if only_frames is None else {"only_frames": list(only_frames)})
    given, has_duration = Prompt.of(prompt).to_record() | ({} if own_text is None else {"prompt": own_text}), False
    patterns: dict[str, Any] = {}
    if error is None:
        given, patterns, has_duration = fill(given, str(path), columns or {})
    settings = given | {
        "decoding": decoding.to_dict(),
        "sample": sample,
        "model_fingerprint": captioner.fingerprint,
        "dtype": captioner.dtype,
        "quantization": captioner.quantization,
    }
    try:
        status = path.stat()
        file = [status.st_size, status.st_mtime_ns]
    except (OSError, ValueError):  # not there, not to be reached, or no file name at all: reading it reports why
        file = None
    names = {"model": captioner.name, "strip": f"{_digest([frames, file])}.webp"}
    # The prompt as filled, so that it is the same request as with the same words; `{duration}` belongs to the file.
    more = ([] if error is None else [error]) + ([{"left": "duration"}] if has_duration else [])
    request = _digest([frames, file, settings, *more])
    wrong = {} if error is None else {"error": error, "is_row_error": True}
    return {"request": request} | frames | settings | patterns | names | wrong


def new_record(settings: dict[str, Any], outcome: Caption | Exception, clip: Clip | None = None) -> dict[str, Any]:
    """A record: the request with its caption or error.

    Args:
        settings: from `request_settings`; with `video_sha256` if already computed.
        outcome: the caption, or the error instead of it.
        clip: the frames that were seen, if it was read.
    """
    names = ("video_sha256", "duration_seconds", "frame_indices", "timestamps_seconds", "video_notes")
    record = settings | dict.fromkeys(names)
    if isinstance(outcome, Caption) and outcome.logprobs and not math.isfinite(outcome.mean_logprob):
        reason = f"log probabilities are not finite; its numbers overflow in {settings['dtype']}, try another dtype"
        outcome = ValueError(f"{settings['video']}: the model's {reason}")
    if isinstance(outcome, Caption) and len(outcome.text) > MAX_TEXT_CHARACTERS:
        outcome = ValueError(
            f"{settings['video']}: the model wrote {len(outcome.text):,} characters; it repeats itself"
        )
    if clip is not None:
        record["duration_seconds"] = round(clip_seconds(clip), 3)
        record["frame_indices"] = list(clip.frame_indices)
        record["timestamps_seconds"] = np.asarray(clip.timestamps_seconds).round(6).tolist()
        record["video_notes"] = clip.info.notes
    if isinstance(outcome, Caption):
        record |= {
            "video_sha256": settings.get("video_sha256") or sha256_if_there(settings["video"]),
            "text": outcome.text,
            "num_tokens": len(outcome.token_ids),
            "mean_logprob": round(outcome.mean_logprob, 6) if outcome.logprobs else None,
            "finish_reason": outcome.finish_reason,
            "seconds": round(outcome.seconds, 4),
            "status": "ok",
            "error": None,
        }
        if outcome.steps:
            record["step_answers"] = [answer for _, answer in outcome.steps]
            record["step_finish_reasons"] = list(outcome.step_finish_reasons)
    else:
        empty = ("text", "num_tokens", "mean_logprob", "finish_reason", "seconds")
        record |= dict.fromkeys(empty) | {"status": "error", "error": str(outcome) or repr(outcome)}
    return record | {"capkit_version": __version__, "created": now()}


def to_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """A pandas table with a row for each record; what UTF-8 cannot hold, as in some file names, is escaped."""
    import pandas as pd

    rows = ({name: encodable(v) if isinstance(v, str) else v for name, v in record.items()} for record in records)
    return pd.DataFrame(rows)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


RECORD_FIELDS = tuple(new_record(request_settings(ModelIdentity("", "", "", None), os.sep, Prompt()), ValueError()))
"""The fields of every record.

Some have `reference`, `only_frames` or `is_row_error` too; of a prompt with fields `prompt_pattern` and
`prompt_fields`, see `capkit.runs.fields`; of one with steps `steps`, `step_answers` and `step_finish_reasons`; in
`current`, `edited_text` and the fields of a mark.
"""
