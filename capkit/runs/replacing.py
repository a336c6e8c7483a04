"""Find and replace in the captions of a store: a preview, then hand edits in one batch that can be taken back."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from capkit.files import now
from capkit.runs.filters import Where, select
from capkit.runs.index import record_text
from capkit.runs.store import CaptionStore, CaptionStoreLike
from capkit.text import plain_text, plural, unknown_name

SHOWN = 10
LINES_AT_ONCE = 1000  # of a batch, in one write


@dataclass(frozen=True)
class Batch:
    """A batch of edits that was written, or taken back.

    Attributes:
        id: by which `undo` finds it.
        num_captions: whose text has changed.
        num_edited_since: whose text has not, because someone has edited it: while the batch was written, or after it.
    """

    id: str
    num_captions: int
    num_edited_since: int


@dataclass(frozen=True, repr=False)
class Replacement:
    """What finding and replacing would do to a store; nothing is written before `write`.

    Attributes:
        store: whose captions.
        pattern, replacement: as of `re.sub`.
        where: which captions.
        num_captions: that `where` leaves.
        num_changed: that would change.
        num_matches: of the pattern in these.
        first: (record, new text) of the first ten.
    """

    store: CaptionStore
    pattern: re.Pattern[str]
    replacement: str
    where: Where
    num_captions: int = 0
    num_changed: int = 0
    num_matches: int = 0
    first: tuple[tuple[dict[str, Any], str], ...] = ()

    def write(self) -> Batch:
        """Store the new texts as hand edits, all or none of them; `undo` takes them back.

        Captions are read again: of one that was edited since the preview the text of now counts.

        Raises:
            ValueError: nothing would change, or what `replace` raises.
            StoreBusy: a run is captioning into the store.
        """
        if not self.num_changed:
            raise ValueError(f"nothing to replace: {self.summary}")
        about = {"pattern": self.pattern.pattern, "replacement": self.replacement}
        return edit_all(self.store, self._edits(), about)

    def _edits(self) -> Iterator[tuple[str, str]]:
        records = select(self.store.current(), self.where)
        for record, text, _ in _changes(records, self.pattern, self.replacement):
            yield record["request"], text

    @property
    def summary(self) -> str:
        """The counts, in words."""
        of = f"{self.num_changed:,} of {plural(self.num_captions, 'caption')}"
        places = f", in {plural(self.num_matches, 'place')}" if self.num_changed else ""
        return f"'{self.pattern.pattern}' would be replaced in {of}{places}"

    def __str__(self) -> str:
        """Counts, and the first texts with [-what goes-] and {+what comes+}."""
        lines = [self.summary]
        for record, _ in self.first:
            marked = self.pattern.sub(self._mark, record_text(record))
            lines += ["", record["video"], f"  {' '.join(marked.split())}"]
        if left := self.num_changed - len(self.first):
            lines += ["", f"and {left:,} more"]
        return "\n".join(map(plain_text, lines))

    __repr__ = __str__

    def _mark(self, match: re.Match[str]) -> str:
        new = match.expand(self.replacement)
        return match[0] if new == match[0] else f"[-{match[0]}-]" + (new and f"{{+{new}+}}")


def replace(store: CaptionStoreLike, pattern: str, replacement: str, where: Where | None = None) -> Replacement:
    r"""Preview finding and replacing in a store's captions, hand-edited or the model's; `.write()` does it.

        preview = capkit.replace("runs/captions.jsonl", r"\bcolou?r of (\w+)", r"\1 colour", where={"mark": "wrong"})
        preview                          # counts, and the first texts with what changes
        batch = preview.write()
        capkit.undo("runs/captions.jsonl", batch)

    Args:
        store: a `CaptionStore` or its path.
        pattern: a regular expression, as of `re`; "(?i)" at its beginning ignores the case.
        replacement: as of `re.sub`: a text, with \1 or \g<name> for what a group matched.
        where: which captions, see `capkit.runs.select`; None for all.

    Raises:
        ValueError: no caption to look at, no regular expression, one that matches where nothing is, an
            unknown group or column, or a caption of which nothing would be left.
    """
    store = CaptionStore.of(store)
    try:
        regex = re.compile(pattern)
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f"pattern={pattern!r:.300}: is no regular expression: {error}") from None
    if not isinstance(replacement, str):
        raise ValueError(f"replacement={replacement!r}: must be a text")
    try:
        regex.sub(replacement, "")
    except (re.error, IndexError, TypeError) as error:
        raise ValueError(f"replacement={replacement!r}: {error}") from None
    where = dict(where or {}) | {"status": "ok"}
    records = select(store.current(), where)
    if not len(records):
        raise ValueError(f"{store.path}: holds no captions where {where}")
    first: list[tuple[dict[str, Any], str]] = []
    num_changed = num_matches = 0
    for record, text, count in _changes(records, regex, replacement):
        num_changed, num_matches = num_changed + 1, num_matches + count
        if len(first) < SHOWN:
            first.append((record, text))
    counts = (len(records), num_changed, num_matches)
    return Replacement(store, regex, replacement, where, *counts, tuple(first))


def _changes(
    records: Iterable[dict[str, Any]], pattern: re.Pattern[str], replacement: str
) -> Iterator[tuple[dict[str, Any], str, int]]:
    """The records whose text would change, with the new one and the number of matches."""
    for record in records:
        text = record_text(record)
        if any(not match[0] for match in pattern.finditer(text)):
            advice = "use + in place of *, or match the character before or after it as well: (.)$ and \\1"
            raise ValueError(f"pattern={pattern.pattern!r}: matches where there is no character; {advice}")
        new, count = pattern.subn(replacement, text)
        if not new.strip() and text:
            raise ValueError(f"{record['video']}: nothing would be left of {text!r}; choose others by pattern or where")
        if new != text:
            yield record, new, count


def edit_all(store: CaptionStore, edits: Iterable[tuple[str, str]], about: dict[str, Any]) -> Batch:
    """Store a batch of hand edits: all of them count once the last is on disk, and none before.

    A text that someone else edits meanwhile keeps that edit.

    Args:
        store: where.
        edits: (request, text); made of the current texts once they are asked for, while they are written.
        about: kept with the batch.
    """
    batch, created = secrets.token_hex(4), now("microseconds")
    with store.hold():
        before, edits, requests = store.index.edits(), iter(edits), set[str]()
        while some := list(islice(edits, LINES_AT_ONCE)):
            store.append(*({"edits": name, "text": text, "batch": batch, "created": created} for name, text in some))
            requests.update(name for name, _ in some)
        if not requests:
            raise ValueError(f"{store.path}: nothing to replace any more; its texts have changed since the preview")
        since = store.index.edits()
        edited = sorted(request for request in requests if since.get(request) != before.get(request))
        store.append({"completes": batch, "leaves_out": edited, **about, "created": created})
    return Batch(batch, len(requests) - len(edited), len(edited))


def undo(store: CaptionStoreLike, batch: str | Batch) -> Batch:
    """Take a batch of edits back: each caption has the text that it had before, unless it was edited again since.

    Raises:
        ValueError: the store has no such batch, or it was taken back before.
    """
    store, name = CaptionStore.of(store), batch.id if isinstance(batch, Batch) else batch
    batches = store.index.batches()
    if name not in batches:
        names = [known for known, counts in batches.items() if counts]
        raise ValueError(f"{store.path}: " + unknown_name("batch", name, names, "to take back there are"))
    if (counts := batches[name]) is None:
        raise ValueError(f"{store.path}: batch {name!r} was taken back before")
    store.append({"undoes": name, "created": now("microseconds")})
    return Batch(name, *counts)
