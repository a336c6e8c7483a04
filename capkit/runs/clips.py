"""Find the clips to caption: globs, folders, manifests and lists become items."""

from __future__ import annotations

import codecs
import fnmatch
import glob
import os
import re
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit.files import open_regular
from capkit.runs.manifests import MANIFEST_SUFFIXES, Item, dictionary_to_item, frame_rows, read_rows, to_items

if TYPE_CHECKING:
    import pandas as pd

from capkit.text import plural, warn

# What FFmpeg reads and people have. Not here: suffixes that are mostly sound (.ogg) or pictures (.webp, .avif, .png).
VIDEO_SUFFIXES = frozenset(
    """
    .mp4 .m4v .mov .qt .f4v .3gp .3g2 .mkv .mk3d .webm .ogv .ogm .avi .divx .wmv .asf .flv .rm .rmvb .gif .apng
    .mpg .mpeg .mpe .m2p .m1v .m2v .vob .ts .mts .m2t .m2ts .tp .trp .wtv .mxf .dv .nut .ivf .obu .y4m
    .h264 .264 .h265 .265 .hevc .mjpeg .mjpg
    """.split()
)
TYPESCRIPT_SUFFIXES = frozenset((".ts", ".mts"))  # which are also MPEG transport streams
NO_VIDEO = "not named like videos"
LeftOut = defaultdict[str, Counter[str]]  # names or suffixes by reason
MOST_LOOKED_FOR = 10_000  # files; on a network's disk, looking for millions takes minutes, and each shard would
DEMO_CLIPS = Path(__file__).parents[1] / "demo" / "clips"


def find_clips(
    videos: str | os.PathLike[str] | dict[str, Any] | pd.DataFrame | Iterable[Any], limit: int | None = None
) -> list[Item]:
    """Find the clips named by a glob, a folder, a file, a manifest, or a list of these.

    Links are followed. Each folder is searched once, even if links form a circle or several lead to it; a link to a
    file is a clip of its own. A warning counts what a folder or a glob leaves out:

    - hidden files and folders, unless the pattern names them (`clips/.cache/*.mp4`), and `__MACOSX`;
    - files without the suffix of a video, unless the pattern ends in theirs (`clips/*.bin`);
    - `.ts` and `.mts` files that are text, such as TypeScript;
    - links to nowhere, and folders that may not be read.

    What is named in `videos` itself, alone or in a list, must be there and hold a clip. A row that cannot be used, of a
    manifest or a dictionary in a list, becomes an item with an `error`, and a warning names it; a row whose file is
    missing becomes an item as any other, and a warning counts those among the first 10,000. Each gets a record with the
    error, and the others are captioned.

    Args:
        videos: "demo" for the clips that come with capkit; a pattern such as "clips/**/*.mp4"; a folder, searched with
            its subfolders; a video; a manifest (.csv, .tsv, .jsonl, .json with a list of objects, or .parquet) or a
            pandas DataFrame with a column `video` (or `file_name`, `filename`, `path`) and optionally `prompt`,
            `reference` (or `caption`, `text`), `start`, `end`, a manifest's paths relative to itself; a dictionary with
            those keys; or a list of these. Cells that are empty, null, NaN or only spaces are as if they were not
            there: a row whose prompt is "" gets the shared one.
        limit: only the first so many.

    Returns:
        Items, sorted for globs and folders, in the given order for lists and manifests.

    Raises:
        ValueError: no clips, none of them usable, an entry of `videos` that is not there, is empty or finds no video, a
            manifest that cannot be read or has no column `video`, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: must be at least 1, or None for all")
    entries = [videos]
    if isinstance(videos, Iterable) and not isinstance(videos, (str, os.PathLike, dict)) and not _is_frame(videos):
        entries = list(videos)
    items: list[Item] = []
    left_out: LeftOut = defaultdict(Counter)
    notes: list[str] = []
    for number, entry in enumerate(entries, 1):
        found = _items(entry, number, left_out, notes)
        if not found:
            raise ValueError(f"no videos found in {str(entry)!r}: {_describe(left_out) or 'nothing is there'}")
        items += found
    if not items:
        raise ValueError(f"no videos found in {str(videos)!r}: nothing is there")
    errors = [item.error for item in items if item.error is not None]
    if len(errors) == len(items):
        raise ValueError(f"{'' if len(items) == 1 else f'none of {len(items)} clips can be captioned: '}{errors[0]}")
    if len(items) == 1 and not os.path.exists(items[0].video):  # of several, a missing one gets a record
        raise ValueError(f"videos: {items[0].video!r}: there is no such file{_where(items[0].video)}")
    if errors:
        first = "; ".join(errors[:3] + ["..."] * (len(errors) > 3))
        notes.append(f"{len(errors)} of {len(items)} clips get a record with an error: {first}")
    looked_for = items[:limit][:MOST_LOOKED_FOR]
    if gone := [item.video for item in looked_for if item.error is None and not os.path.exists(item.video)]:
        among = "the first " if len(looked_for) < len(items[:limit]) else ""
        counts = f"{len(gone)} of {among}{plural(len(looked_for), 'clip')}"
        notes.append(f"{counts}: there is no such file as {gone[0]}{_where(gone[0])}")
    if left_out:
        notes.append(f"{entries[0] if len(entries) == 1 else 'videos'}: {_describe(left_out)}")
    for note in dict.fromkeys(filter(None, notes)):
        warn(note, stacklevel=2)
    return items[:limit]


def _where(path: str | os.PathLike[str]) -> str:
    return "" if os.path.isabs(path) else f" (relative paths begin at {os.getcwd()})"


def _items(entry: Any, number: int, left_out: LeftOut, notes: list[str]) -> list[Item]:
    if isinstance(entry, dict):
        item, note = dictionary_to_item(entry, f"videos, row {number}")
        notes.append(note)
        return [item]
    if not isinstance(entry, (str, os.PathLike)):
        if _is_frame(entry):
            items, note = to_items([*frame_rows(entry, "DataFrame")], Path(), "DataFrame")
            notes.append(note)
            return items
        raise ValueError(f"videos: {entry!r} must be a name, a pattern, or a dictionary with 'video'")
    if not os.fspath(entry).strip():
        raise ValueError('videos: a name is empty; name a folder, a video, ...; "." is the current folder')
    path = DEMO_CLIPS if entry == "demo" else Path(os.path.expanduser(entry))
    folder, pattern = _split_pattern(path)
    if os.path.isdir(path):
        return [Item(file) for file in _search(folder, ["**"], left_out)]
    if pattern:
        return [item for file in _search(folder, pattern, left_out) for item in _file(Path(file), notes)]
    if isinstance(entry, str) and "://" in entry:
        raise ValueError(f"videos: {entry!r} is an address; download it first")
    if not os.path.exists(path):
        raise ValueError(f"videos: {str(entry)!r:.1000}: there is no such file or folder{_where(path)}")
    return _file(path, notes)


def _file(path: Path, notes: list[str]) -> list[Item]:
    """The items of a file that was named: of a manifest all, of a video one."""
    suffix = path.suffix.lower()
    if suffix in MANIFEST_SUFFIXES:
        items, note = to_items(read_rows(path, "a manifest"), path.parent, str(path))
        notes.append(note)
        return items
    if suffix not in VIDEO_SUFFIXES and _is_text(str(path)):
        kinds = ", ".join(sorted(MANIFEST_SUFFIXES))
        return [Item(str(path), error=f"{path}: is a text, not a video; a manifest is named {kinds}")]
    return [Item(str(path))]


def _is_frame(value: object) -> bool:
    pandas = sys.modules.get("pandas")  # whoever has a DataFrame has imported it
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _split_pattern(path: Path) -> tuple[str, list[str]]:
    """Split off what precedes the first part with wildcards. An existing "take [1].mp4" is taken literally."""
    folder, parts = "", deque(path.parts)
    while parts and (not glob.has_magic(parts[0]) or os.path.lexists(os.path.join(folder, parts[0]))):
        folder = os.path.join(folder, parts.popleft())
    return folder, [*parts]


def _search(folder: str, pattern: list[str], left_out: LeftOut) -> list[str]:
    """Find the videos below a folder that match a pattern, given in parts; sorted."""
    named = os.path.splitext(pattern[-1])[1].lower()  # a suffix that the user asks for
    suffixes = VIDEO_SUFFIXES | ({named} if named or not glob.has_magic(pattern[-1]) else set())
    files = []
    for path in _walk(folder, pattern, left_out):
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in suffixes:
            left_out[NO_VIDEO][suffix or "no suffix"] += 1
        elif suffix in TYPESCRIPT_SUFFIXES and _is_text(path):
            left_out["in plain text"][path] += 1
        else:
            files.append(path)
    return sorted(files, key=lambda file: file.split(os.sep))


def _walk(start: str, pattern: list[str], left_out: LeftOut) -> Iterator[str]:
    """The files below a folder that match a pattern, given in parts; "**" is any number of folders.

    A folder is searched for several parts at once, its positions in the pattern, and never twice for the same.
    """
    pattern = [*pattern, "*"] if pattern[-1] == "**" else pattern
    last = len(pattern) - 1
    matchers = [re.compile(fnmatch.translate(os.path.normcase(part))).match for part in pattern]
    searched: dict[tuple[int, int], set[int]] = defaultdict(set)  # positions by device and inode
    folders, links = [(start, {0})], deque[tuple[str, set[int]]]()
    while folders or links:  # links last, so that a file has its name without them if there is one
        folder, positions = folders.pop() if folders else links.popleft()
        for position in range(last):
            if position in positions and pattern[position] == "**":
                positions.add(position + 1)  # "**" may be no folder at all
        try:
            status = os.stat(folder or os.curdir)
            positions -= searched[status.st_dev, status.st_ino]
            if not positions:
                left_out["folders already searched"][folder] += 1
                continue
            searched[status.st_dev, status.st_ino] |= positions
            with os.scandir(folder or os.curdir) as entries:
                children = sorted(entries, key=lambda child: child.name)
        except OSError as error:
            left_out["unreadable"][f"{folder}: {error.strerror}"] += 1
            continue
        for child in children:
            path, name = os.path.join(folder, child.name), os.path.normcase(child.name)
            matched = {position for position in positions if matchers[position](name)}
            is_hidden = name[0] == "." or child.name == "__MACOSX"
            visible = {p for p in matched if pattern[p][0] == name[0]} if is_hidden else matched
            if _is(child.is_dir):
                if below := {position + (pattern[position] != "**") for position in visible - {last}}:
                    (links if child.is_symlink() else folders).append((path, below))
                elif matched - {last}:
                    left_out["hidden"][path] += 1
            elif visible and not _is(child.is_file):
                left_out["unreadable"][path] += 1  # a link to nowhere
            elif last in visible:
                yield path
            elif last in matched and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:  # do not speak of .DS_Store
                left_out["hidden"][path] += 1


def _is(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # links in a circle, or into a folder that may not be read
        return False


def _is_text(path: str) -> bool:
    try:
        with open_regular(path) as file:
            head = file.read(1024)
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except (OSError, UnicodeDecodeError):
        return False
    return head != b"" and b"\0" not in head


def _describe(left_out: LeftOut) -> str:
    """Such as "left out 12 not named like videos (.txt 8, .jpg 4), 1 hidden (clips/.git)"; "" for nothing."""
    parts = []
    for reason, counts in left_out.items():
        names = [f"{name} {n}" if reason == NO_VIDEO else name for name, n in counts.most_common(3)]
        names += ["..."] if len(counts) > 3 else []
        parts.append(f"{counts.total()} {reason} ({', '.join(names)})")
    return f"left out {', '.join(parts)}" if parts else ""
