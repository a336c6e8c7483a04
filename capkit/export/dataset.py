"""Export clips and captions of stores as training data: choose, clean, write, and read back as the trainer does."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from capkit.export.choose import Choice, Chosen, check_choices, choose_records
from capkit.export.cleaning import CLEANING, clean, trim_to_sentence
from capkit.export.clip_names import name_clips
from capkit.export.layouts import LAYOUTS, Layout, Pair
from capkit.export.report import COLUMNS, ExportReport, shared_openings
from capkit.export.write import is_exported, write_export
from capkit.files import file_sha256, output_folder
from capkit.runs import to_frame
from capkit.sweep import COGVIDEOX_1_5_T5_LIMIT, describe, near_duplicates, t5_counter
from capkit.text import encodable, plain_text
from capkit.video import FrameSampling, VideoError, load_clip

ROWS_AT_ONCE = 10_000  # the words of so many captions are in memory
ESTIMATE_ERROR = 0.1  # relative, see capkit.sweep.t5.estimate_t5_tokens


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
    it.

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
        tokenizer: T5 tokenizer or its folder, such as `tokenizer/` of a CogVideoX checkpoint; None or "" to estimate.
            Because estimates err, captions then count as too long from a tenth below the limit.
        overwrite: replace an earlier export in this layout, if nothing else is in its folder.

    Raises:
        ValueError: a wrong argument; several captions of a clip and no choice; nothing to export; a folder that holds
            something else, cached latents among it, which trainers would use for the new clips.
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
    is_estimate = tokenizer is None or tokenizer == ""
    threshold = int(token_limit * (1 - ESTIMATE_ERROR)) if is_estimate else token_limit
    trigger_word = trigger_word.strip()
    prefix = f"{trigger_word} " if trigger_word else ""
    limit = _TokenLimit(threshold, on_too_long, prefix, t5_counter(tokenizer), is_estimate)
    rows = []
    for chosen in choose_records(stores, choose):
        row = _row(chosen, rules)
        row["reason"] = encodable(chosen.reason or _unfit_clip(kind, chosen, row) or _fit_text(row, kind, limit))
        rows.append(row)
    fit = [row for row in rows if not row["reason"]]
    if not fit:
        refused = "\n".join(plain_text(f"  {row['video']}: {row['reason']}") for row in rows[:10])
        raise ValueError(f"nothing to export; of {len(rows)} clips, the first:\n{refused}")
    pairs = []
    for row, name in zip(fit, name_clips([row["clip"] for row in fit]), strict=True):
        row["file"] = (Path(kind.clip_folder) / name).as_posix()
        pairs.append(Pair(row["clip"], name, row["text"]))
    if not is_exported(kind, root, pairs, overwrite):
        write_export(kind, root, pairs, clips)
    report = ExportReport(
        layout=kind.name,
        output_dir=root,
        table=_table(rows, limit),
        shared_openings=shared_openings([row["caption"] for row in fit]),
        token_limit=token_limit,
        threshold=threshold,
        read_back=f"read back as {kind.trainer} reads it: all {len(pairs)} pairs are right",
        command=kind.command(root, trigger_word),
        options={"cleaning": rules, "on_too_long": on_too_long, "trigger_word": trigger_word, "clips": clips},
    )
    report.save()
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
    is_exported(kind, root, [], overwrite=True)  # raises for a folder that holds something else
    output_folder(root.parent)


@dataclass(frozen=True)
class _TokenLimit:
    """How many T5 tokens a caption may have, and what to do with a longer one."""

    threshold: int
    on_too_long: str
    prefix: str  # the trigger word and a space
    count_tokens: Callable[[str], int]
    is_estimate: bool

    def count(self, caption: str) -> int:
        """T5 tokens of a caption with the trigger word."""
        return self.count_tokens(self.prefix + caption)


def _check_value(name: str, value: Any, values: Sequence[str] | dict[str, Any]) -> None:
    if value not in values:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, values))}")


def _row(chosen: Chosen, rules: Sequence[str]) -> dict[str, Any]:
    record = chosen.record
    original = record.get("edited_text", record.get("text")) or ""
    text, changed_by = clean(original.strip(), record, rules)
    return {
        "clip": chosen.clip,
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
    if num_tokens > limit.threshold and limit.on_too_long != "report":
        counted = "estimated" if limit.is_estimate else "counted"
        reason = f"has {num_tokens} T5 tokens ({counted}), more than {limit.threshold}"
        if limit.on_too_long == "refuse":
            return reason
        text = trim_to_sentence(text, limit.threshold, limit.count)
        if not text:
            return f"{reason}; not even its first sentence fits"
        row["changed_by"].append("trimmed")
        num_tokens = limit.count(text)
    row["caption"], row["num_t5_tokens"] = text, num_tokens
    row["text"] = text if kind.adds_trigger else limit.prefix + text
    return kind.unfit(row["text"])


def _table(rows: list[dict[str, Any]], limit: _TokenLimit) -> pd.DataFrame:
    """The report's table: the rows and measures of the captions; the trigger word counts for tokens only."""
    table = to_frame(rows)
    table["status"] = table["reason"].eq("").map({True: "exported", False: "refused"})
    table["changed_by"] = table["changed_by"].map(", ".join)
    exported = table[table["status"] == "exported"]
    table["num_t5_tokens"] = exported["num_t5_tokens"].astype("Int64")
    table["t5_is_estimate"] = pd.Series(limit.is_estimate, exported.index, dtype="boolean")
    table["over_limit"] = table["num_t5_tokens"] > limit.threshold
    columns = ["num_words", "boilerplate_opening"]
    texts = pd.DataFrame({"text": exported["caption"]})
    parts = [texts[start : start + ROWS_AT_ONCE] for start in range(0, len(texts), ROWS_AT_ONCE)]
    table[columns] = pd.concat([describe(part)[columns] for part in parts])
    repeats = near_duplicates(list(exported["caption"]), exported.index)
    table["near_duplicate"] = pd.Series(repeats, exported.index, dtype="boolean")
    first = exported.groupby("sha256")["video"].transform("first")
    table["same_file_as"] = first.where(first != exported["video"], "").reindex(table.index, fill_value="")
    return table[list(COLUMNS)]
