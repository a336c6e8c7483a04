"""Export clips and captions of stores as training data: choose, clean, write, and read back as the trainer does."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from capkit.export.choose import CUT, ENTIRE, SEEN, Choice, Chosen, as_list, check_choices, choose_records
from capkit.export.cleaning import CLEANING, clean, trim_to_sentence
from capkit.export.clip_files import ClipFiles
from capkit.export.clip_names import name_clips
from capkit.export.layouts import LAYOUTS, Layout, Pair
from capkit.export.report import ExportReport, csv_cell, shared_openings
from capkit.export.write import hold_folder, is_exported, write_export
from capkit.files import DiskList, atomic_write, output_folder
from capkit.runs import TrainerSettings, seen_part, window_name
from capkit.sweep import COGVIDEOX_1_5_T5_LIMIT, count_words, near_duplicates, stock_opening, t5_counter
from capkit.text import encodable, plain_text
from capkit.video import at_least_one, finite_float

PARTS = {ENTIRE: "", SEEN: "{}: what the trainer sees", CUT: "{}: cut out and encoded anew"}


def export_dataset(
    stores: Any,
    layout: str,
    output_dir: str | os.PathLike[str],
    *,
    choose: Choice | Sequence[Choice] = (),
    leave_out: Sequence[str] = ("wrong",),
    cleaning: str | Sequence[str] = (),
    token_limit: int = COGVIDEOX_1_5_T5_LIMIT,
    trigger_word: str = "",
    on_too_long: str = "report",
    clips: str = "link",
    tokenizer: Any = None,
    overwrite: bool = False,
    trainer: TrainerSettings | Mapping[str, Any] | None = None,
    cut: str = "",
    crf: int = 18,
    several: bool = False,
    empty_share: float = 0.0,
    seed: int = 0,
) -> ExportReport:
    """Write clips and captions in a trainer's layout, and read them back by the trainer's own rules.

    Texts edited by hand are preferred to the model's, and captions of the window that the trainer sees to those of the
    entire file. What the trainer cannot take is refused clip by clip with the reason: clips that are missing or have
    changed since, that its decoder cannot open or that are too short, captions of other windows, captions that it would
    read differently. The folder gets its name only after it has been read back correctly; a report, and the file of
    settings that some trainers need, are written beside it. Captions are kept in temporary files beside it meanwhile,
    because a million take gigabytes.

    Args:
        stores: a caption store or its file, or several.
        layout: a name of LAYOUTS.
        output_dir: the trainer's root; must be new, empty, or hold the same export.
        choose: which of several captions of a clip, see `choose_records`.
        leave_out: marks of captions that are not exported, see `CaptionStore.mark`; () exports them, too.
        cleaning: a name of CLEANING, or several; none by default. White space around a caption is always stripped.
        token_limit: T5 tokens that the trainer keeps, `</s>` included; 224 is safe for every CogVideoX.
        trigger_word: goes before every caption and is counted; written only if the trainer cannot add it itself.
        on_too_long: "report", "trim" at the end of a sentence, or "refuse".
        clips: "link" (symbolic), "copy" or "hardlink".
        tokenizer: of another T5, see `capkit.sweep.t5_counter`; None or "" for CogVideoX's.
        overwrite: replace an earlier export in this layout, if nothing else is in its folder.
        trainer: what the trainer is set to, `TrainerSettings` or its fields: {"num_frames": 49}. It tells which window
            of a clip the trainer sees and which clips it can take, and is in the command.
        cut: "encode" makes clips of windows that the trainer would not see as they are: just their frames, encoded anew
            as H.264 without sound, in `<output_dir>.cut/`, which the export links to. An export that was stopped goes
            on with those in it. "" refuses such windows.
        crf: quality of these, see `capkit.video.cutting.cut_clip`.
        several: export all captions of a clip that `choose` matches, in its order, or all that there are without it,
            such as long and short ones or the samples of a sweep; only where the layout has room for them.
        empty_share: share of the clips, from 0 to below 1, that get an empty caption in place of theirs, for
            classifier-free guidance; where the trainer drops captions itself, its own option is better.
        seed: chooses those clips, by their content, whatever their order.

    Raises:
        ValueError: a wrong argument; several captions of a clip and no choice; nothing to export; a folder that holds
            something else, cached latents among it, which trainers would use for the new clips.
        ExportBusy: another process is exporting to the folder.
        ExportError: it could not be written, or not read back.
    """
    options: dict[str, Any] = {
        "leave_out": list(leave_out) if isinstance(leave_out, (list, tuple)) else leave_out,
        "cleaning": cleaning,
        "token_limit": token_limit,
        "on_too_long": on_too_long,
        "clips": clips,
        "trainer": trainer,
        "cut": cut,
        "crf": crf,
        "several": several,
        "empty_share": empty_share,
        "seed": seed,
        "trigger_word": trigger_word,
    }
    check_export(layout, output_dir, choose=choose, tokenizer=tokenizer, **options)
    _check_switch("overwrite", overwrite)
    rules = as_list(cleaning or ())
    kind, root = LAYOUTS[layout], Path(os.path.abspath(Path(output_dir).expanduser()))
    settings = TrainerSettings.of(kind.window_rule, trainer)
    trigger_word = encodable(trigger_word.strip())
    prefix = f"{trigger_word} " if trigger_word else ""
    limit = _TokenLimit(token_limit, on_too_long, prefix, t5_counter(tokenizer))
    cuts = root.with_name(f"{root.name}.cut") if cut else None
    with hold_folder(root), ClipFiles(kind, settings, cuts, crf) as files:
        export = _Export(kind, root)
        records = choose_records(stores, choose, leave_out, is_seen=files.is_seen, cut=bool(cut), several=several)
        for chosen in records:
            row = _row(chosen, rules)
            row["reason"] = encodable(chosen.reason or files.check(chosen, row) or _fit_text(row, kind, limit))
            export.add(row)
        if not export.rows:
            raise ValueError("nothing to export: there are no captions in the stores")
        if not export.places:
            refused = "\n".join(plain_text(f"  {row['video']}: {row['reason']}") for row in export.rows[:10])
            raise ValueError(f"nothing to export; of {len(export.rows)} clips, the first:\n{refused}")
        export.choose_empty(empty_share, seed)
        export.name_clips()
        if not is_exported(kind, root, export.pairs, clips, overwrite):
            write_export(kind, root, export.pairs, clips)
        if kind.config_suffix:
            atomic_write(kind.config_path(root), kind.config(root, trigger_word, settings))
        report = ExportReport(
            layout=kind.name,
            output_dir=root,
            shared_openings=shared_openings(export.captions),
            token_limit=token_limit,
            read_back=f"read back as {kind.trainer} reads it: all {len(export.pairs)} pairs are right",
            command=kind.command(root, trigger_word, settings),
            options=options | {"cleaning": rules, "trigger_word": trigger_word, "trainer": asdict(settings)},
            num_left_out=records.num_left_out,
        )
        report.save(export.report_rows(limit))
    return report


def check_export(
    layout: str,
    output_dir: str | os.PathLike[str],
    *,
    choose: Choice | Sequence[Choice] = (),
    leave_out: Sequence[str] = ("wrong",),
    cleaning: str | Sequence[str] = (),
    token_limit: int = COGVIDEOX_1_5_T5_LIMIT,
    on_too_long: str = "report",
    clips: str = "link",
    tokenizer: Any = None,
    trainer: TrainerSettings | Mapping[str, Any] | None = None,
    cut: str = "",
    crf: int = 18,
    several: bool = False,
    empty_share: float = 0.0,
    seed: int = 0,
    trigger_word: str = "",
) -> None:
    """Check arguments of `export_dataset`, for example before the captions are made; it raises the same ValueErrors."""
    rules = as_list(cleaning or ())
    _check_value("layout", layout, LAYOUTS)
    _check_value("on_too_long", on_too_long, ("report", "trim", "refuse"))
    _check_value("clips", clips, ("link", "copy", "hardlink"))
    _check_value("cut", cut, ("", "encode"))
    _check_value("crf", crf, range(52))
    _check_switch("several", several)
    if type(seed) is not int:
        raise ValueError(f"seed={seed!r}: must be a whole number")
    if not all(rule in [*CLEANING] for rule in rules):
        raise ValueError(f"cleaning={rules!r}: must be of {', '.join(map(repr, CLEANING))}")
    if not isinstance(trigger_word, str):
        raise ValueError(f"trigger_word={trigger_word!r}: must be a text")
    if at_least_one("token_limit", token_limit) < 2:
        raise ValueError(f"token_limit={token_limit!r}: must be at least 2, one of them for </s>")
    check_choices(choose, leave_out)
    t5_counter(tokenizer)
    kind, root = LAYOUTS[layout], Path(os.path.abspath(Path(output_dir).expanduser()))
    _check_captions(kind, several, empty_share, trigger_word)
    TrainerSettings.of(kind.window_rule, trainer)
    if reason := kind.unfit_root(root):
        raise ValueError(f"output_dir: {reason}")
    is_exported(kind, root, [], clips, overwrite=True)  # raises for a folder that holds something else
    output_folder(root.parent)


def _check_captions(kind: Layout, several: bool, empty_share: float, trigger_word: str) -> None:
    """Raise ValueError if the layout has no room for several captions or for empty ones, or needs a package."""
    if several and not kind.holds_several:
        names = ", ".join(name for name, other in LAYOUTS.items() if other.holds_several)
        raise ValueError(f"several=True: {kind.trainer} reads one caption a clip; there is room for more in {names}")
    if (share := finite_float(empty_share)) is None or not 0 <= share < 1:
        raise ValueError(f"empty_share={empty_share!r}: must be at least 0 and below 1")
    if empty_share and kind.as_read("") != [""]:
        raise ValueError(
            f"empty_share={empty_share!r}: {kind.trainer} cannot read an empty caption; drop captions there"
        )
    if empty_share and kind.adds_trigger and trigger_word.strip():
        raise ValueError(
            f"empty_share={empty_share!r}: {kind.trainer} would put the trigger word before empty captions"
        )
    if kind.needs_package and not find_spec(kind.needs_package):
        raise ValueError(f"layout={kind.name!r}: needs {kind.needs_package}: pip install {kind.needs_package}")


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


def _check_value(name: str, value: Any, values: Sequence[Any] | dict[str, Any]) -> None:
    if value not in [*values]:
        names = f"{values[0]} to {values[-1]}" if isinstance(values, range) else ", ".join(map(repr, values))
        raise ValueError(f"{name}={value!r}: must be one of {names}")


def _check_switch(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name}={value!r}: must be true or false")


class _Export:
    """An export on its way. Texts are on disk, so that a clip takes some hundred bytes of memory."""

    def __init__(self, layout: Layout, root: Path):
        self.layout, self.root, self.folder = layout, root, root.parent
        self.rows = DiskList(self.folder)  # of all captions, for the report
        self.places = array("q")  # in `rows`, of the captions that are exported
        self.captions = DiskList(self.folder)  # the same, without the trigger word
        self.firsts = array("q")  # in `places`, of the first caption of each clip
        self.empty: set[int] = set()  # numbers of the clips whose caption is to be empty
        self.pairs = DiskList(self.folder, self._pair)
        self._clip, self._texts = "", set[str]()  # of the last row that is exported

    def _pair(self, value: Any) -> Pair:
        clip, name, texts, facts, strip = value
        return Pair(Path(clip), name, tuple(texts), self.root / self.layout.clip_folder / name, facts, strip)

    def add(self, row: dict[str, Any]) -> None:
        """Add a caption; those of a clip come one after the other."""
        if not row["reason"] and row["clip"] == self._clip and row["text"] in self._texts:
            row["reason"] = "another caption of the clip reads the same"
        if not row["reason"]:
            if row["clip"] != self._clip:
                self._clip, self._texts = row["clip"], set()
                self.firsts.append(len(self.places))
            self._texts.add(row["text"])
            self.places.append(len(self.rows))
            self.captions.append(row["caption"])
        self.rows.append(row)

    def choose_empty(self, share: float, seed: int) -> None:
        """Fill `empty`."""
        if count := round(share * len(self.firsts)):
            contents = (self.rows[self.places[first]]["sha256"] for first in self.firsts)
            keys = [sha256(f"{seed} {content}".encode()).digest()[:8] for content in contents]
            self.empty = set(sorted(range(len(keys)), key=keys.__getitem__)[:count])

    def name_clips(self) -> None:
        """Fill `pairs`."""
        clips = DiskList(self.folder, Path)
        for first in self.firsts:
            clips.append(self.rows[self.places[first]]["clip"])
        ends = self.firsts[1:]
        ends.append(len(self.places))
        for number, (first, end, name) in enumerate(zip(self.firsts, ends, name_clips(clips), strict=True)):
            rows = [self.rows[place] for place in self.places[first:end]]
            texts = [""] if number in self.empty else [row["text"] for row in rows]
            self.pairs.append([rows[0]["clip"], name, texts, rows[0]["facts"], rows[0]["strip"]])

    def report_rows(self, limit: _TokenLimit) -> Iterator[dict[str, Any]]:
        """The rows of `ExportReport.table`; the trigger word counts for tokens only."""
        counts = np.diff(np.append(self.firsts, len(self.places)))
        clip_of = np.repeat(np.arange(len(counts)), counts)
        repeats = near_duplicates(self.captions, clip_of)
        digests = np.array([int(self.rows[place]["sha256"][:15], 16) for place in self.places])
        _, first_of, kind_of = np.unique(digests, return_index=True, return_inverse=True)
        number = 0  # of a caption among those that are exported
        for row in self.rows:
            row |= {"status": "refused", "changed_by": ", ".join(row["changed_by"]), "same_file_as": ""}
            if row["reason"]:
                yield row | {"num_t5_tokens": None}
                continue
            caption, clip, first = self.captions[number], int(clip_of[number]), first_of[kind_of[number]]
            is_first = self.firsts[clip] == number
            if clip in self.empty:
                caption = row["text"] = ""
                row |= {"num_t5_tokens": limit.count_tokens(""), "changed_by": "emptied"}
            yield row | {
                "is_first": is_first,
                "is_empty": not caption,
                "status": "exported",
                "file": (Path(self.layout.clip_folder) / self.pairs[clip].name).as_posix(),
                "num_words": count_words(caption),
                "boilerplate_opening": stock_opening(caption),
                "over_limit": row["num_t5_tokens"] > limit.num_tokens,
                "near_duplicate": bool(repeats[number]),
                "same_file_as": "" if clip_of[first] == clip else self.rows[self.places[first]]["video"],
                "csv_cell": csv_cell(row["text"]) if self.layout.has_csv else "",
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
        "mark": record.get("mark", ""),
        "changed_by": changed_by,
        "sha256": "",
        "store": encodable(str(chosen.store)),
        "request": record.get("request", ""),
        "num_t5_tokens": None,
        "part": PARTS[chosen.part].format(window_name(record)),
        "not_taken": chosen.not_taken,
        "saw": seen_part(record),
        "facts": {},
        "strip": "",
    }


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
