"""Export clips and captions of stores as training data: choose, clean, write, and read back as the trainer does."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capkit.export.choose import Choice, Chosen, check_choices, choose_records
from capkit.export.cleaning import CLEANING, clean, trim_to_sentence
from capkit.export.clip_names import name_clips
from capkit.export.layouts import LAYOUTS, Layout, Pair
from capkit.export.report import ExportReport, shared_openings
from capkit.export.write import hold_folder, is_exported, write_export
from capkit.files import DiskList, file_sha256, output_folder
from capkit.sweep import COGVIDEOX_1_5_T5_LIMIT, count_words, near_duplicates, stock_opening, t5_counter
from capkit.text import encodable, plain_text
from capkit.video import FrameSampling, VideoError, load_clip


def export_dataset(
    stores: Any,
    layout: str,
    output_dir: str | os.PathLike[str],
    *,
    choose: Choice | Sequence[Choice] = (),
    cleaning: str | Sequence[str] = (),
    token_limit: int = COGVIDEOX_1_5_T5_LIMIT,
    trigger_word: str = "",
    on_too_long: str = "report",
    clips: str = "link",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write clips and captions in a trainer's layout, and read them back by the trainer's own rules.

    Texts edited by hand are preferred to the model's. What the layout cannot hold is refused clip by clip with the
    reason: captions of parts of a clip, clips that are missing or have changed since, captions that the trainer would
    read differently. The folder gets its name only after it has been read back correctly; a report is written beside
    it. Captions are kept in temporary files beside it meanwhile, because a million take gigabytes.

    Args:
        stores: a caption store or its file, or several.
        layout: a name of LAYOUTS.
        output_dir: the trainer's root; must be new, empty, or hold the same export.
        choose: which of several captions of a clip, see `choose_records`.
        cleaning: a name of CLEANING, or several; none by default. White space around a caption is always stripped.
        token_limit: T5 tokens that the trainer keeps, `</s>` included; 224 is safe for every CogVideoX.
        trigger_word: goes before every caption and is counted; written only if the trainer cannot add it itself.
        on_too_long: "report", "trim" at the end of a sentence, or "refuse".
        clips: "link" (symbolic), "copy" or "hardlink".
        tokenizer: of another T5, see `capkit.sweep.t5_counter`; None or "" for CogVideoX's.
        overwrite: replace an earlier export in this layout, if nothing else is in its folder.

    Raises:
        ValueError: a wrong argument; several captions of a clip and no choice; nothing to export; a folder that holds
            something else, cached latents among it, which trainers would use for the new clips.
        ExportBusy: another process is exporting to the folder.
        ExportError: it could not be written, or not read back.
    """
    options: dict[str, Any] = {
        "cleaning": cleaning,
        "token_limit": token_limit,
        "on_too_long": on_too_long,
        "clips": clips,
    }
    check_export(layout, output_dir, choose=choose, tokenizer=tokenizer, **options)
    rules = [cleaning] if isinstance(cleaning, str) and cleaning else list(cleaning)
    kind, root = LAYOUTS[layout], Path(os.path.abspath(Path(output_dir).expanduser()))
    trigger_word = encodable(trigger_word.strip())
    prefix = f"{trigger_word} " if trigger_word else ""
    limit = _TokenLimit(token_limit, on_too_long, prefix, t5_counter(tokenizer))
    with hold_folder(root):
        export = _Export(kind, root)
        for chosen in choose_records(stores, choose):
            row = _row(chosen, rules)
            row["reason"] = encodable(chosen.reason or _unfit_clip(kind, chosen, row) or _fit_text(row, kind, limit))
            export.add(row)
        if not export.rows:
            raise ValueError("nothing to export: there are no captions in the stores")
        if not export.places:
            refused = "\n".join(plain_text(f"  {row['video']}: {row['reason']}") for row in export.rows[:10])
            raise ValueError(f"nothing to export; of {len(export.rows)} clips, the first:\n{refused}")
        export.name_clips()
        if not is_exported(kind, root, export.pairs, clips, overwrite):
            write_export(kind, root, export.pairs, clips)
        report = ExportReport(
            layout=kind.name,
            output_dir=root,
            shared_openings=shared_openings(export.captions),
            token_limit=token_limit,
            read_back=f"read back as {kind.trainer} reads it: all {len(export.pairs)} pairs are right",
            command=kind.command(root, trigger_word),
            options={"cleaning": rules, "on_too_long": on_too_long, "trigger_word": trigger_word, "clips": clips},
        )
        report.save(export.report_rows(limit))
    return report


def check_export(
    layout: str,
    output_dir: str | os.PathLike[str],
    *,
    choose: Choice | Sequence[Choice] = (),
    cleaning: str | Sequence[str] = (),
    token_limit: int = COGVIDEOX_1_5_T5_LIMIT,
    on_too_long: str = "report",
    clips: str = "link",
    tokenizer: Any = None,
) -> None:
    """Check arguments of `export_dataset`, for example before the captions are made; it raises the same ValueErrors."""
    rules = [cleaning] if isinstance(cleaning, str) and cleaning else list(cleaning)
    _check_value("layout", layout, LAYOUTS)
    _check_value("on_too_long", on_too_long, ("report", "trim", "refuse"))
    _check_value("clips", clips, ("link", "copy", "hardlink"))
    if set(rules) - set(CLEANING):
        raise ValueError(f"cleaning={rules!r}: must be of {', '.join(map(repr, CLEANING))}")
    if token_limit < 2:
        raise ValueError(f"token_limit={token_limit!r}: must be at least 2, one of them for </s>")
    check_choices(choose)
    t5_counter(tokenizer)
    kind, root = LAYOUTS[layout], Path(os.path.abspath(Path(output_dir).expanduser()))
    if reason := kind.unfit_root(root):
        raise ValueError(f"output_dir: {reason}")
    is_exported(kind, root, [], clips, overwrite=True)  # raises for a folder that holds something else
    output_folder(root.parent)


@dataclass(frozen=True)
class _TokenLimit:
    """How many T5 tokens a caption may have, and what to do with a longer one."""

    num_tokens: int
    on_too_long: str
    prefix: str  # the trigger word and a space
    count_tokens: Callable[[str], int]

    def count(self, caption: str) -> int:
        """T5 tokens of a caption with the trigger word."""
        return self.count_tokens(self.prefix + caption)


def _check_value(name: str, value: Any, values: Sequence[str] | dict[str, Any]) -> None:
    if value not in values:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, values))}")


class _Export:
    """An export on its way. Texts are on disk, so that a clip takes some hundred bytes of memory."""

    def __init__(self, layout: Layout, root: Path):
        self.layout, self.folder = layout, root.parent
        self.rows = DiskList(self.folder)  # of all clips, for the report
        self.places = array("q")  # in `rows`, of the clips that are exported
        self.captions = DiskList(self.folder)  # of these clips, without the trigger word
        self.pairs = DiskList(self.folder, lambda value: Pair(Path(value[0]), *value[1:]))

    def add(self, row: dict[str, Any]) -> None:
        if not row["reason"]:
            self.places.append(len(self.rows))
            self.captions.append(row["caption"])
        self.rows.append(row)

    def name_clips(self) -> None:
        """Fill `pairs`."""
        clips = DiskList(self.folder, Path)
        for place in self.places:
            clips.append(self.rows[place]["clip"])
        for place, name in zip(self.places, name_clips(clips), strict=True):
            row = self.rows[place]
            self.pairs.append([row["clip"], name, row["text"]])

    def report_rows(self, limit: _TokenLimit) -> Iterator[dict[str, Any]]:
        """The rows of `ExportReport.table`; the trigger word counts for tokens only."""
        repeats = near_duplicates(self.captions, range(len(self.captions)))
        digests = np.array([int(self.rows[place]["sha256"][:15], 16) for place in self.places])
        _, first_of, kind_of = np.unique(digests, return_index=True, return_inverse=True)
        number = 0  # of a clip among those that are exported
        for row in self.rows:
            row |= {"status": "refused", "changed_by": ", ".join(row["changed_by"]), "same_file_as": ""}
            if row["reason"]:
                yield row | {"num_t5_tokens": None}
                continue
            caption, first = self.captions[number], first_of[kind_of[number]]
            yield row | {
                "status": "exported",
                "file": (Path(self.layout.clip_folder) / self.pairs[number].name).as_posix(),
                "num_words": count_words(caption),
                "boilerplate_opening": stock_opening(caption),
                "over_limit": row["num_t5_tokens"] > limit.num_tokens,
                "near_duplicate": bool(repeats[number]),
                "same_file_as": "" if first == number else self.rows[self.places[first]]["video"],
            }
            number += 1


def _row(chosen: Chosen, rules: Sequence[str]) -> dict[str, Any]:
    record = chosen.record
    original = record.get("edited_text", record.get("text")) or ""
    text, changed_by = clean(original.strip(), record, rules)
    return {
        "clip": str(chosen.clip),
        "video": encodable(str(chosen.clip)),
        "file": "",
        "text": text,
        "original": original,
        "edited": "edited_text" in record,
        "changed_by": changed_by,
        "sha256": "",
        "store": encodable(str(chosen.store)),
        "request": record.get("request", ""),
        "num_t5_tokens": None,
    }


def _unfit_clip(kind: Layout, chosen: Chosen, row: dict[str, Any]) -> str:
    """Why a clip cannot be exported, or "" with its digest in the row."""
    suffix = chosen.clip.suffix.lower()
    if kind.clip_suffixes and suffix not in kind.clip_suffixes:
        return f"{kind.trainer} takes only {', '.join(sorted(kind.clip_suffixes))}, not {suffix or 'no suffix at all'}"
    try:
        if not stat.S_ISREG(os.stat(chosen.clip).st_mode):  # a pipe would have no end
            return "the clip is not a regular file"
        row["sha256"] = file_sha256(chosen.clip)
    except (OSError, ValueError) as error:
        return f"the clip cannot be read: {getattr(error, 'strerror', None) or error}"
    captioned = chosen.record.get("video_sha256")
    if captioned and captioned != row["sha256"]:
        return "the clip has changed since it was captioned; caption it again"
    if not captioned:  # nothing tells that this file was captioned, and a store of someone else may name any
        try:
            load_clip(chosen.clip, FrameSampling("uniform", 1))
        except VideoError as error:
            return f"the clip cannot be read as a video: {error.reason}"
    return ""


def _fit_text(row: dict[str, Any], kind: Layout, limit: _TokenLimit) -> str:
    """Why a caption cannot be exported, or "" with the text to write and its number of tokens in the row."""
    text = row["text"]
    if not text:
        return "the caption is empty"
    num_tokens = limit.count(text)
    if num_tokens > limit.num_tokens and limit.on_too_long != "report":
        reason = f"has {num_tokens} T5 tokens, more than {limit.num_tokens}"
        if limit.on_too_long == "refuse":
            return reason
        text = trim_to_sentence(text, limit.num_tokens, limit.count)
        if not text:
            return f"{reason}; not even its first sentence fits"
        row["changed_by"].append("trimmed")
        num_tokens = limit.count(text)
    row["caption"], row["num_t5_tokens"] = text, num_tokens
    row["text"] = text if kind.adds_trigger else limit.prefix + text
    return kind.unfit(row["text"])
