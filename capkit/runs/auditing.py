"""How many captions of a store are wrong: a random sample to mark, and its error rate with an interval."""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capkit.runs.filters import Where, column_text, select
from capkit.runs.index import Records
from capkit.runs.lines import MARK_FIELDS, MARKS
from capkit.runs.store import RECORD_FIELDS, CaptionStore, CaptionStoreLike
from capkit.text import plural, unknown_name
from capkit.video import at_least_one

if TYPE_CHECKING:
    import pandas as pd

TAIL = 0.025  # on each side of an interval


@dataclass(frozen=True, repr=False)
class Audit:
    """A random sample of a store's captions, to mark with `CaptionStore.mark` or `capkit.playground.Marking`.

    Iterating gives the records that are still to be marked.

    Attributes:
        store: whose captions.
        where: which of them.
        num_in_store: how many of them there are.
        requests: of the sample, in random order.
    """

    store: CaptionStore
    where: Where
    num_in_store: int
    requests: list[str] = field(repr=False)

    @property
    def records(self) -> Records:
        """The sample, with the marks of now."""
        return self.store.latest(self.requests)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (record for record in self.records if record.get("mark") not in MARKS)

    def error_rate(self, by: str | None = None) -> pd.DataFrame:
        """The share of wrong captions with its 95 % interval, in one row, or one for each value of a column.

        Columns: `num_in_store`, `num_captions` (of the sample), `num_right`, `num_wrong`, `num_unsure`,
        `num_unmarked`; `share_wrong`: of those marked right or wrong; `low`, `high`: the 95 % interval of the share in
        the store. Whatever is not known counts against precision: at `low` captions that are unsure or not marked yet
        are taken as right, at `high` as wrong, so that nobody gains by marking the easy ones first.

        The interval inverts the hypergeometric distribution (mid-p), because the sample is drawn from a store of known
        size: of a store that is in the sample as a whole the share is known.

        Args:
            by: a column of the records, such as "prompt"; a row for each of its values in the sample.

        Raises:
            ValueError: no record of the sample has the column.
        """
        import pandas as pd

        records = list(self.records)
        groups, sizes = {"": records}, {"": self.num_in_store}
        if by is not None:
            names = dict.fromkeys([*RECORD_FIELDS, "edited_text", *(name for record in records for name in record)])
            if by not in names:
                raise ValueError("by: " + unknown_name("column", by, names, "there are"))
            sizes = Counter(column_text(record.get(by)) for record in select(self.store.current(), self.where))
            groups = {}
            for record in records:
                groups.setdefault(column_text(record.get(by)), []).append(record)
        rows = []
        for value, of_value in groups.items():
            size = max(sizes[value], len(of_value))
            marks = Counter(record.get("mark") for record in of_value)
            counts = {f"num_{mark}": marks[mark] for mark in MARKS}
            num_known, num_wrong = marks["right"] + marks["wrong"], marks["wrong"]
            num_unknown = len(of_value) - num_known
            low, high = _interval(num_wrong, num_wrong + num_unknown, len(of_value), size)
            row: dict[str, Any] = {"num_in_store": size, "num_captions": len(of_value), **counts}
            row |= {"num_unmarked": num_unknown - marks["unsure"]}
            row |= {"share_wrong": num_wrong / num_known if num_known else float("nan"), "low": low, "high": high}
            rows.append(({} if by is None else {by: value}) | row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        row = self.error_rate().iloc[0]
        text = f"{plural(len(self.requests), 'caption')} of {self.num_in_store:,} to mark, {row.num_unmarked:.0f} left"
        if num_known := row.num_right + row.num_wrong:
            interval = f"95 % interval {row.low:.1%} to {row.high:.1%}"
            text += f"; {row.num_wrong:.0f} of {num_known:.0f} are wrong, {row.share_wrong:.1%}, {interval}"
        if len(self.requests) > self.num_in_store / 2:
            text += "; most of the store is in the sample: the interval is for this store, not for clips to come"
        return text

    __repr__ = __str__


def audit(store: CaptionStoreLike, num_captions: int, seed: int = 0, where: Where | None = None) -> Audit:
    """Draw a random sample of a store's captions, to mark each as right or wrong and to estimate how many are wrong.

    The same seed draws the same captions, also after they are marked or edited, and a larger sample begins with the
    smaller one. Captions that are marked already keep their marks.

    Args:
        store: a `CaptionStore` or its path.
        num_captions: how many to draw; all if there are not so many.
        seed: of the draw.
        where: from which captions, see `capkit.runs.select`; None for all.

    Raises:
        ValueError: no captions to draw from, fewer than one to draw, a column that no record has, or one of marks.
    """
    num_captions = at_least_one("num_captions", num_captions)
    store, where = CaptionStore.of(store), dict(where or {}) | {"status": "ok"}
    if changing := set(MARK_FIELDS) & where.keys():
        raise ValueError(f"where: has {changing.pop()!r} in it, which changes while you mark; choose by other columns")
    records = select(store.current(), where)
    if not len(records):
        raise ValueError(f"{store.path}: holds no captions where {where}")

    def draw(request: str) -> bytes:  # a random number for each, which does not depend on what else is in the store
        return hashlib.sha256(f"{seed} {request}".encode(errors="surrogatepass")).digest()

    requests = (record["request"] for record in records)
    return Audit(store, where, len(records), heapq.nsmallest(num_captions, requests, key=draw))


def _interval(num_low: int, num_high: int, num_captions: int, num_in_store: int) -> tuple[float, float]:
    """The 95 % interval of a share in a store, from a sample without replacement: (0, 1) if the sample is empty.

    Args:
        num_low, num_high: wrong captions of the sample, at least and at most.
        num_captions: of the sample.
        num_in_store: of the store.

    Source: the mid-p interval of Lancaster (1961), as recommended by Agresti and Gottard (2007) for the binomial
    distribution, here for the hypergeometric one.
    """
    from scipy.stats import hypergeom

    def at_least(wrong: int) -> float:
        drawn = (num_low, num_in_store, wrong, num_captions)
        return float(hypergeom.sf(*drawn) + hypergeom.pmf(*drawn) / 2)

    def at_most(wrong: int) -> float:
        drawn = (num_high, num_in_store, wrong, num_captions)
        return float(hypergeom.cdf(*drawn) - hypergeom.pmf(*drawn) / 2)

    lowest = range(num_low, num_in_store - num_captions + num_low + 1)  # numbers of wrong captions in the store
    highest = range(num_high, num_in_store - num_captions + num_high + 1)
    low = lowest[bisect_right(lowest, TAIL, key=at_least)]
    high = highest[bisect_left(highest, -TAIL, key=lambda wrong: -at_most(wrong)) - 1]
    return low / num_in_store, high / num_in_store
