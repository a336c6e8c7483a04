"""Read tables of clips from files, DataFrames and dictionaries; a bad row becomes an item that carries its error."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from capkit.cogvlm2 import Prompt
from capkit.files import open_regular, read_regular
from capkit.runs.lines import MAX_PATH_CHARACTERS, MAX_TEXT_CHARACTERS
from capkit.text import encodable
from capkit.video import check_window, finite_float

if TYPE_CHECKING:
    import pandas as pd

MANIFEST_SUFFIXES = frozenset((".csv", ".tsv", ".jsonl", ".json", ".parquet"))
DECIMAL_COMMA = re.compile(r"^\s*(\d+),(\d+)\s*$")
# Each column with the names it goes by, the first choice first.
COLUMNS = {
    "video": ("video", "file_name", "filename", "path"),
    "prompt": ("prompt",),
    "reference": ("reference", "caption", "text"),
    "start": ("start",),
    "end": ("end",),
}


@dataclass(frozen=True)
class Item:
    """A clip to caption: a video file, and its entries in a manifest.

    Unusable entries do not raise: they are left out and described in `error`, so that one bad clip stops no others.

    Attributes:
        video: file name.
        prompt: this clip's own question; None for the one that all clips share.
        reference: a caption to compare with; kept in the record, not shown to the model.
        start, end: window in seconds; end None for the end of the video.
        error: why the clip cannot be captioned; its record has this error, and the video is not read.
        columns: the manifest's other columns, by name, for fields of a prompt such as `{camera}`.
        only_frames: indices of the video's frames to sample among, as those that a trainer takes; None for all.
    """

    video: str
    prompt: str | None = None
    reference: str | None = None
    start: float = 0.0
    end: float | None = None
    error: str | None = None
    columns: Mapping[str, Any] | None = field(default=None, hash=False)
    only_frames: tuple[int, ...] | None = None

    @property
    def values(self) -> dict[str, Any]:
        """All columns, by each of their names, for the fields of a prompt: see `capkit.runs.fields`."""
        known = {"video": encodable(self.video), "reference": self.reference}
        known = {name: value for column, value in known.items() for name in COLUMNS[column]}
        return known | {"start": self.start, "end": self.end} | dict(self.columns or {})

    def __post_init__(self) -> None:
        problems = []
        for name, check, otherwise in (
            ("video", _check_video, self.video if _is_address(self.video) else reprlib.repr(self.video)),
            ("prompt", lambda text: text if text is None else Prompt(_check_encoding(text)).text, None),
            ("reference", lambda text: text if text is None else _check_text(text), None),
            ("start", lambda start: _check_window(start, None)[0], 0.0),
            ("end", lambda end: _check_window(self.start, end)[1], None),
        ):
            try:
                value = check(getattr(self, name))
            except ValueError as problem:
                problems.append(f"{name}: {problem}")
                value = otherwise
            object.__setattr__(self, name, value)
        if problems and self.error is None:
            object.__setattr__(self, "error", "; ".join(problems))


def check_items(items: Iterable[Item]) -> list[Item]:
    """The items as a list; TypeError for anything else, such as a file name."""
    checked: list[Any] = [items] if isinstance(items, (str, os.PathLike)) else list(items)
    for item in checked:
        if not isinstance(item, Item):
            made = "find_clips makes items of files, folders, patterns and manifests"
            raise TypeError(f"items: {reprlib.repr(item)} is not an Item; {made}")
    return checked


def _is_address(name: Any) -> bool:
    return isinstance(name, str) and "://" in name and len(name) < MAX_PATH_CHARACTERS // 2


def _check_video(name: Any) -> str:
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"must be a file name, not {reprlib.repr(name)}")
    name = os.fspath(name)
    is_short = len(name) < MAX_PATH_CHARACTERS // 2  # the record has the absolute path
    try:
        is_file_name = is_short and bool(name.strip()) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair; other lone surrogates stand for bytes that are not UTF-8
        is_file_name = False
    if not is_file_name:
        raise ValueError(f"{reprlib.repr(name)} cannot be the name of a file")
    if "://" in name:
        raise ValueError(f"{name!r:.300} is an address; download it first, because only local files can be read")
    return name


def _check_text(text: Any) -> str:
    """The text; ValueError unless it is a `str` of a sensible length that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"must be a text, not {reprlib.repr(text)}")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"has {len(text):,} characters; {MAX_TEXT_CHARACTERS:,} are the most")
    return _check_encoding(text)


def _check_encoding(text: Any) -> Any:
    """The value; ValueError for a text that cannot be written as UTF-8."""
    if isinstance(text, str) and (bad := re.search("[\ud800-\udfff]", text)):
        is_a_byte = "\udc80" <= bad[0] <= "\udcff"  # see `_read_lines`
        reason = "; save the file as UTF-8, in Excel as 'CSV UTF-8'" if is_a_byte else ", or was cut within a character"
        raise ValueError(f"{reprlib.repr(text)} is not UTF-8{reason}")
    return text


def _check_window(start: Any, end: Any) -> tuple[float, float | None]:
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, str):
            hint = f"; write {value.replace(',', '.')}" if DECIMAL_COMMA.search(value) else ""
            raise ValueError(f"{name}_seconds must be a number, such as 2.5; got {value!r}{hint}")
    check_window(start, end)
    return finite_float(start) or 0.0, finite_float(end)


class Row(NamedTuple):
    """A row of a table; empty cells are None.

    Attributes:
        place: where it is, such as "clips.csv, row 2 (line 3)".
        cells: by column.
        error: what is wrong with the row as such.
    """

    place: str
    cells: dict[str, Any]
    error: str | None = None

    def text(self, column: str) -> str:
        """A cell that must hold a text, or a file name in the column `video`; ValueError with its place otherwise."""
        check = _check_video if column == "video" else _check_text
        try:
            if self.error is None:
                return check(self.cells.get(column))
        except ValueError as error:
            raise ValueError(f"{self.place}, column {column}: {error}") from None
        raise ValueError(f"{self.place}, {self.error}")

    def window(self) -> tuple[float, float | None] | None:
        """Start and end in seconds; None if there are no such columns. ValueError with its place if they are wrong."""
        if not {"start", "end"} & self.cells.keys():
            return None
        start, end = (_number(self.cells.get(name)) for name in ("start", "end"))
        try:
            return _check_window(0.0 if start is None else start, end)
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from None


def read_rows(path: Path, kind: str) -> list[Row]:
    """Read a table from a .csv, .tsv, .json (a list of objects) or .parquet file, or from JSON lines.

    Text is UTF-8, or UTF-16 with a byte order mark. Cells of CSV files are texts, never numbers; the separator is the
    comma, the semicolon or the tab, whichever the header has most of. Empty rows are left out. NaN is an empty cell.

    Args:
        path: the file.
        kind: what an error calls it, such as "a manifest".

    Raises:
        ValueError: with path and line, for a file that cannot be read so, or has no rows.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".parquet": _read_parquet}
    try:
        rows = list(readers.get(path.suffix.lower(), _read_json_lines)(path))
    except (ValueError, csv.Error, OSError, RecursionError, ImportError) as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {error}") from error
    if not rows:
        is_csv = path.suffix.lower() in (".csv", ".tsv")
        names = " below its first line, which must name the columns, such as video, prompt" if is_csv else ""
        raise ValueError(f"{path}: has no rows{names}")
    return rows


def _read_lines(path: Path) -> list[str]:
    content = read_regular(path)
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Bytes that are not UTF-8 stay themselves in file names; in other texts, they are an error of their row.
    text = content.decode("utf-16") if is_utf_16 else content.decode("utf-8-sig", "surrogateescape")
    return list(io.StringIO(text, newline=""))


def _read_csv(path: Path) -> Iterator[Row]:
    lines = _read_lines(path)
    first = next((line for line in lines if line.strip()), "")
    separators = "\t,;" if path.suffix.lower() == ".tsv" else ",;\t"
    separator = max(separators, key=lambda separator: len(next(csv.reader([first], delimiter=separator), [])))
    header: list[str] = []
    number = 0
    for line, cells in _csv_records(lines, separator):
        if not header:
            if isinstance(cells, csv.Error):
                raise cells
            header = [cell.strip() for cell in cells]
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise ValueError(f"column {twice[0]!r} is there twice")
            continue
        number += 1
        place = f"{path}, row {number} (line {line})"
        if isinstance(cells, csv.Error):
            yield Row(place, {}, f"not valid CSV: {cells}; write a quotation mark within quotation marks twice")
        elif more := cells[len(header) :]:  # even if it is empty: another cell may be in the wrong column
            cut = f"column {header[-1]}: followed by {len(more)} more, {reprlib.repr(separator.join(more))}"
            yield Row(place, {}, f"{cut}; put quotation marks around a text with {separator!r} in it")
        else:
            row = dict(zip_longest(header, cells))
            if separator == ";":  # as Excel writes it where the comma is the decimal separator
                times = {name: row[name] or "" for name in row if name.lower() in ("start", "end")}
                row |= {name: DECIMAL_COMMA.sub(r"\1.\2", cell) for name, cell in times.items()}
            yield _row(place, row)


def _csv_records(lines: Sequence[str], separator: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Line number and cells of each record that is not empty; after an error, the next line begins a record."""
    start = 0
    while start < len(lines):
        rest = map(lines.__getitem__, range(start, len(lines)))
        reader = csv.reader(rest, delimiter=separator, skipinitialspace=True, strict=True)
        before = csv.field_size_limit(2**31 - 1)
        try:
            cells: list[str] | csv.Error = next(reader)
            num_lines = reader.line_num
        except csv.Error as error:
            cells, num_lines = error, 1
        finally:
            csv.field_size_limit(before)
        if isinstance(cells, csv.Error) or any(map(str.strip, cells)):
            yield start + 1, cells
        start += num_lines


def _read_json_lines(path: Path) -> Iterator[Row]:
    number = 0
    for line, text in enumerate(_read_lines(path), 1):
        if text.strip():
            number += 1
            place = f"row {number} (line {line})"
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # the file is damaged or cut short: all of it is doubtful
                reason = f"not valid JSON: {getattr(error, 'msg', error)}"
                raise ValueError(f'{place}, {reason}; a row is one line, such as {{"video": "a.mp4"}}') from error
            yield _row(f"{path}, {place}", row)


def _read_json(path: Path) -> Iterator[Row]:
    content = json.loads("".join(_read_lines(path)))
    if not isinstance(content, list):
        raise ValueError("must be a list of objects")
    return (_row(f"{path}, row {number}", row) for number, row in enumerate(content, 1))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pandas as pd

    with open_regular(path) as file:
        return frame_rows(pd.read_parquet(file), str(path))


def frame_rows(frame: pd.DataFrame, source: str) -> Iterator[Row]:
    """The rows of a DataFrame. Raises ValueError if two columns share a name."""
    if not frame.columns.is_unique:
        raise ValueError(f"{source}: two columns share a name: {list(frame.columns)}")
    records = frame.astype(object).to_dict("records")
    return (_row(f"{source}, row {number}", record) for number, record in enumerate(records, 1))


def _row(place: str, content: Any) -> Row:
    if not isinstance(content, dict):
        return Row(place, {}, f"must be an object with the column video, not {reprlib.repr(content)}")
    return Row(place, {str(name): None if _is_empty(cell) else cell for name, cell in content.items()})


def _is_empty(cell: Any) -> bool:
    """Whether a cell is blank, or NaN, which is how pandas keeps and writes empty cells."""
    return str(cell).strip().lower() in (("", "nan") if isinstance(cell, str) else ("none", "nan", "nat", "<na>"))


def choose_columns(
    rows: Sequence[Row], columns: Mapping[str, Sequence[str]], source: str
) -> tuple[list[Row], list[str], str]:
    """Rename the columns of a table.

    Args:
        rows: of the table.
        columns: names that each column goes by, the first choice first; upper and lower case are the same.
        source: what a note calls the table.

    Returns:
        The rows with these columns alone; the columns that were left out; a note on what was renamed and left out.

    Raises:
        ValueError: no row is usable because there is no column `video`.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    chosen: dict[str, str] = {}
    for column, known_as in columns.items():
        known = [name for alias in known_as for name in names if name.strip().lower() == alias]
        chosen |= {known[0]: column} if known else {}
    if names and "video" not in chosen.values():
        raise ValueError(f"{source}: has no column 'video', but {names[:20]}; {_describe(columns)}")
    ignored = [name for name in names if name not in chosen]
    notes = [f"column {name} is read as {column}" for name, column in chosen.items() if name != column]
    notes += [f"ignored columns {ignored}"] if ignored else []
    note = f"{source}: {'; '.join(notes)}; {_describe(columns)}" if notes else ""
    renamed = [{chosen[name]: cell for name, cell in row.cells.items() if name in chosen} for row in rows]
    return [row._replace(cells=cells) for row, cells in zip(rows, renamed, strict=True)], ignored, note


def _describe(columns: Mapping[str, Sequence[str]]) -> str:
    others = {name: [alias for alias in known_as if alias != name] for name, known_as in columns.items()}
    names = [f"{name} (or {', '.join(also)})" if also else name for name, also in others.items()]
    return f"columns are {', '.join(names)}"


def to_items(rows: Sequence[Row], folder: Path, source: str) -> tuple[list[Item], str]:
    """Items of a table's rows, and what to warn of; relative paths begin at `folder`. See `choose_columns`."""
    chosen, others, note = choose_columns(rows, COLUMNS, source)
    if not others:
        return [_item(row, folder) for row in chosen], note
    note += f"; a prompt may have them as fields, such as {{{others[0]}}}"
    columns = ({name: row.cells.get(name) for name in others} for row in rows)
    return [_item(row, folder, own) for row, own in zip(chosen, columns, strict=True)], note


def dictionary_to_item(entries: Mapping[str, Any], place: str) -> tuple[Item, str]:
    """The item of a dictionary that a person wrote, in which an unknown name is a mistake; and what to warn of."""
    row = _row(place, dict(entries))
    try:
        (row,), unknown, note = choose_columns([row], COLUMNS, "videos")
    except ValueError:
        unknown, note = [name for name in row.cells if name not in COLUMNS], ""
    if unknown:
        allowed = f"must have 'video', and may have {', '.join([*COLUMNS][1:])}, nothing else"
        row, note = row._replace(error=f"{allowed}; not {reprlib.repr(unknown)}"), ""
    return _item(row, Path()), note


def _item(row: Row, folder: Path, columns: Mapping[str, Any] | None = None) -> Item:
    cells = {name: cell for name, cell in row.cells.items() if cell is not None and name in COLUMNS}
    error, video = row.error, cells.pop("video", None)
    if isinstance(video, (str, os.PathLike)) and "://" not in str(video):
        video = str(folder / os.path.expanduser(video))
    if video is None:
        error, video = error or "column video: is empty", row.place
    cells |= {name: _number(cells[name]) for name in ("start", "end") if name in cells}
    item = Item(video, **cells, columns=columns)
    if error is None and item.error is not None:
        error = f"column {item.error}"
    return item if error is None else replace(item, error=f"{row.place}, {error}")


def _number(cell: Any) -> Any:
    try:
        return float(cell) if isinstance(cell, str) and "_" not in cell else cell  # 1_0 is 10 for Python only
    except ValueError:
        return cell  # which Item refuses
