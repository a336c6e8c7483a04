"""From caption stores to a folder that a trainer reads: choose, clean, write, read back, and only then show it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from capkit.export.base import Layout, Pair
from capkit.export.choosing import Choice, Chosen, choose_records
from capkit.export.cleaning import CLEANING, clean, trim_to_sentence
from capkit.export.lists import CogVideo, CogVideoXFactory, Diffusers
from capkit.export.naming import name_clips
from capkit.export.report import COLUMNS, ExportReport, shared_openings
from capkit.export.sidecars import SAT, Sidecars
from capkit.export.tables import CogKit, CogKitImageToVideo, Finetrainers, VideoFolder, VideoFolderCSV, VideoXFun
from capkit.export.writing import is_there, write_export
from capkit.files import file_sha256
from capkit.sweep import COGVIDEOX_1_5_T5_LIMIT, describe, near_duplicates, t5_counter

_KINDS = (CogVideo, CogKit, CogKitImageToVideo, Diffusers, Finetrainers, Sidecars, VideoFolder, VideoFolderCSV)
LAYOUTS: dict[str, Layout] = {kind.name: kind() for kind in (*_KINDS, CogVideoXFactory, SAT, VideoXFun)}
"""The layouts by name."""

TOO_LONG = ("report", "trim", "refuse")
CLIPS = ("link", "copy", "hardlink")
ESTIMATE_ERRS_BY = 0.1  # see capkit.sweep.t5.estimate_t5_tokens


def export_dataset(
    stores: Any,
    layout: str,
    output_dir: str | os.PathLike,
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
    """Write clips and captions as a trainer reads them, and read them back by the trainer's own rules.

    Texts edited by hand go before the model's. What the layout cannot hold is refused clip by clip with the reason:
    captions of parts of a clip, clips that are gone or have changed since, captions that the trainer would read
    otherwise. The folder appears under its name only when it has been read back right; a report stands beside it.

    Args:
        stores: a caption store or its file, or several.
        layout: a name of LAYOUTS.
        output_dir: the trainer's root; must be new, empty, or hold the same export.
        choose: which of several captions of a clip, see `choose_records`.
        cleaning: a name of CLEANING, or several; none unless chosen. White space around a caption never counts.
        token_limit: T5 tokens that the trainer keeps, `</s>` included; 224 is safe for every CogVideoX.
        trigger_word: goes before every caption and is counted; written only where the trainer cannot add it itself.
        on_too_long: "report", "trim" at the end of a sentence, or "refuse".
        clips: "link" (symbolic), "copy" or "hardlink".
        tokenizer: T5 tokenizer or its folder, such as `tokenizer/` of a CogVideoX checkpoint; None or "" to estimate.
            Estimates err, so that a caption then counts as too long at a tenth below the limit.
        overwrite: replace an earlier export in this layout, if nothing else is in its folder.

    Raises:
        ValueError: a wrong argument; several captions of a clip and no choice; nothing to export; a folder that holds
            something else, latents among it, which trainers would use for the new clips.
        ExportError: it could not be written, or not read back.
    """
    cleaning = [cleaning] if isinstance(cleaning, str) and cleaning else cleaning
    kind = _check(layout, cleaning, on_too_long, clips, token_limit)
    root = Path(os.path.abspath(Path(output_dir).expanduser()))
    if reason := kind.unfit_root(root):
        raise ValueError(f"output_dir: {reason}")
    budget = _Budget.of(token_limit, on_too_long, trigger_word, tokenizer)
    rows = []
    for chosen in choose_records(stores, choose):
        row = _row(chosen, cleaning)
        row["reason"] = chosen.reason or _unfit_clip(kind, chosen, row) or _fit_text(row, kind, budget)
        rows.append(row)
    fit = [row for row in rows if not row["reason"]]
    if not fit:
        told = "\n".join(f"  {row['video']}: {row['reason']}" for row in rows[:10])
        raise ValueError(f"nothing to export; of {len(rows)} clips, the first:\n{told}")
    names = name_clips([row["clip"] for row in fit])
    for row, name in zip(fit, names, strict=True):
        row["file"] = (Path(kind.clip_folder) / name).as_posix()
    pairs = [Pair(row["clip"], name, row["text"]) for row, name in zip(fit, names, strict=True)]
    if not is_there(kind, root, pairs, overwrite):
        write_export(kind, root, pairs, clips)
    report = ExportReport(
        *(kind.name, root, _table(rows, budget), shared_openings([row["caption"] for row in fit])),
        *(token_limit, budget.threshold, f"read back as {kind.trainer} reads it: all {len(pairs)} pairs are right"),
        kind.command(root, budget.before.strip()),
        {"cleaning": list(cleaning), "on_too_long": on_too_long, "trigger_word": trigger_word, "clips": clips},
    )
    report.save()
    return report


@dataclass(frozen=True)
class _Budget:
    """How many T5 tokens a caption may have, and what becomes of one that has more."""

    threshold: int
    on_too_long: str
    before: str  # the trigger word and a space
    count_alone: Callable[[str], int]
    how: str

    @classmethod
    def of(cls, token_limit: int, on_too_long: str, trigger_word: str, tokenizer: Any) -> _Budget:
        is_exact = tokenizer is not None and tokenizer != ""
        threshold = token_limit if is_exact else int(token_limit * (1 - ESTIMATE_ERRS_BY))
        before = f"{trigger_word.strip()} " if trigger_word.strip() else ""
        return cls(threshold, on_too_long, before, t5_counter(tokenizer), "counted" if is_exact else "estimated")

    def count(self, caption: str) -> int:
        """T5 tokens of a caption with the trigger word before it."""
        return self.count_alone(self.before + caption)


def _check(layout, cleaning, on_too_long, clips, token_limit) -> Layout:
    known = {"layout": (layout, LAYOUTS), "on_too_long": (on_too_long, TOO_LONG), "clips": (clips, CLIPS)}
    for name, (value, values) in known.items():
        if value not in values:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, values))}")
    if set(cleaning) - set(CLEANING):
        raise ValueError(f"cleaning={cleaning!r}: must be of {', '.join(map(repr, CLEANING))}")
    if token_limit < 2:
        raise ValueError(f"token_limit={token_limit!r}: must be at least 2, one of them for </s>")
    return LAYOUTS[layout]


# ---- a clip --------------------------------------------------------------------------------------------------------


def _row(chosen: Chosen, cleaning: Sequence[str]) -> dict[str, Any]:
    record = chosen.record or {}
    said = record.get("edited_text", record.get("text")) or ""
    original = said.encode("utf-8", "backslashreplace").decode()  # tables and files hold no half surrogate pairs
    text, changed_by = clean(original.strip(), record, cleaning)
    return {
        **{"clip": chosen.clip, "video": str(chosen.clip), "file": "", "text": text, "original": original},
        **{"edited": "edited_text" in record, "changed_by": changed_by, "sha256": ""},
        "is_text": original == said,
        **{"store": str(chosen.store or ""), "request": record.get("request", ""), "num_t5_tokens": None},
    }


def _unfit_clip(kind: Layout, chosen: Chosen, row: dict[str, Any]) -> str:
    """Why a clip cannot be exported; keeps its digest in the row."""
    suffix = chosen.clip.suffix.lower()
    if kind.clip_suffixes and suffix not in kind.clip_suffixes:
        return f"{kind.trainer} takes only {', '.join(sorted(kind.clip_suffixes))}, not {suffix or 'no suffix at all'}"
    try:
        row["sha256"] = file_sha256(chosen.clip)
    except OSError as error:
        return f"the clip cannot be read: {error.strerror or error}"
    captioned = chosen.record.get("video_sha256")
    if captioned and captioned != row["sha256"]:
        return "the clip has changed since it was captioned; caption it again"
    return ""


def _fit_text(row: dict[str, Any], kind: Layout, budget: _Budget) -> str:
    """Why a caption cannot be exported, or "" once the row's `text` is what is to be written."""
    text = row["text"]
    if not text:
        return "the caption is empty"
    if not row["is_text"]:
        return "the caption has half a surrogate pair in it, which no file in UTF-8 can hold"
    num_tokens = budget.count(text)
    if num_tokens > budget.threshold and budget.on_too_long != "report":
        text = "" if budget.on_too_long == "refuse" else trim_to_sentence(text, budget.threshold, budget.count)
        if not text:
            why = "" if budget.on_too_long == "refuse" else "; not even its first sentence fits"
            return f"has {num_tokens} T5 tokens ({budget.how}), more than {budget.threshold}{why}"
        row["changed_by"].append("trimmed")
        num_tokens = budget.count(text)
    row["caption"], row["num_t5_tokens"] = text, num_tokens
    row["text"] = text if kind.adds_trigger else budget.before + text
    return kind.unfit(row["text"])


def _table(rows: list[dict[str, Any]], budget: _Budget) -> pd.DataFrame:
    """The rows with what can be said of the captions; the trigger word counts for tokens only."""
    table = pd.DataFrame(rows)
    table["status"] = table["reason"].eq("").map({True: "exported", False: "refused"})
    table["changed_by"] = table["changed_by"].map(", ".join)
    done = table[table["status"] == "exported"]
    table["num_t5_tokens"] = done["num_t5_tokens"].astype("Int64")
    table["t5_is_estimate"] = pd.Series(budget.how == "estimated", done.index, dtype="boolean")
    table["over_limit"] = table["num_t5_tokens"] > budget.threshold
    described = describe(pd.DataFrame({"text": done["caption"]}))
    table[["num_words", "boilerplate_opening"]] = described[["num_words", "boilerplate_opening"]]
    table["near_duplicate"] = pd.Series(near_duplicates(list(done["caption"]), done.index), done.index, dtype="boolean")
    first = done.groupby("sha256")["video"].transform("first")
    table["same_file_as"] = first.where(first != done["video"], "").reindex(table.index, fill_value="")
    return table[list(COLUMNS)]
