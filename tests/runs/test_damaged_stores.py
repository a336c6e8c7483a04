"""A hundred kinds of damage to stores: whoever reads them goes on with the good lines, and each bad line is named."""

import json
import random
import re
import sys
import warnings

import pandas as pd
import pytest
from store_records import an_error, make_record

import capkit.__main__
from capkit import CaptionStore, Prompt
from capkit.export import choose_records, export_dataset
from capkit.runs import Shard, merge
from capkit.runs.shards import write_plan
from capkit.sweep import agreement, describe
from capkit.views import show_captions, write_gallery


def encode(record, **fields):
    return json.dumps(record | fields).encode()


def without(record, name):
    return encode({key: value for key, value in record.items() if key != name})


WRONG = {
    **dict.fromkeys(("request", "video", "strip", "model", "created", "dtype"), [5, None, [], {"a": 1}, True]),
    **dict.fromkeys(("prompt", "template", "frame_numbers"), [5, None, {}, [""]]),
    **dict.fromkeys(("text", "status"), [5, None, ["ok"], {}]),
    **dict.fromkeys(("finish_reason", "video_sha256", "quantization"), [5, [], {"a": 1}, 0.5]),
    **dict.fromkeys(("start_seconds", "sample"), ["0", None, [], {}, True, 10**400]),
    **dict.fromkeys(("end_seconds", "duration_seconds", "seconds"), ["1.5", [], True, 1e300]),
    "mean_logprob": ["x", [], 900.0, False],
    "num_tokens": ["20", 2.5, [20], True, -(10**30)],
    "decoding": [5, None, [1], {"temperature": "warm"}, {"temperature": [0.5]}, {"seed": 10**400}],
    "frame_sampling": ["chat", 5, None, {"strategy": 5}, {"strategy": "chat", "num_frames": "x"}],
    "history": [5, "ab", [5], [["a"]], [["a", 5]], {"a": "b"}],
    "frame_indices": [5, "0", {}, ["0"], [0.5], [None], [True], [10**400]],
    "timestamps_seconds": [5, "0", {"a": 0}, ["0"], [None], [[0]], [1e300]],
    "video_notes": [5, "HDR", [5], [None]],
}


def damages():
    """(name, what becomes of a good record's line) for every kind of damage."""
    yield from (
        (f"{value} instead of a record", lambda r, v=value: v) for value in (b"5", b"[1]", b'"a"', b"null", b"x")
    )
    yield "torn", lambda r: encode(r)[: len(encode(r)) // 2]
    yield "not UTF-8", lambda r: encode(r).replace(b"lawn", b"l\xe4wn")
    yield "NULs", lambda r: encode(r).replace(b"lawn", b"\0\0\0\0")
    yield "only NULs", lambda r: b"\0" * 4096
    yield "UTF-16", lambda r: encode(r).decode().encode("utf-16").replace(b"\n", b"")
    yield "nested", lambda r: encode(r)[:-1] + b', "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "NaN", lambda r: encode(r, mean_logprob=float("nan"))
    yield "Infinity in an own field", lambda r: encode(r, own=float("-inf"))
    yield "half a character", lambda r: encode(r, text="A \ud83d dog.")
    yield "a key twice", lambda r: encode(r)[:-1] + b', "text": "Another."}'
    yield "a key twice inside", lambda r: encode(r).replace(b'"strategy"', b'"strategy": "base", "strategy"')
    yield "a file name with NUL", lambda r: encode(r, video="/clips/\0.mp4")
    yield "an edit without text", lambda r: encode({"edits": r["request"], "created": "2026"})
    yield "an edit of no time", lambda r: encode({"edits": r["request"], "text": "By hand.", "created": 5})
    yield "an edit of a number", lambda r: encode({"edits": 5, "text": "By hand."})
    yield "an edit with half a character", lambda r: encode({"edits": r["request"], "text": "\udc00"})
    yield "an error without a reason", lambda r: without(an_error(r), "error")
    yield "two lines in one", lambda r: encode(r) + encode(r)
    yield "50 MB", lambda r: encode(r, text="long " * 10_000_000)
    for name in ("request", "video", "status", "text"):
        yield f"no {name}", lambda r, n=name: without(r, n)
    for name, values in WRONG.items():
        for value in values:
            yield f"{name}={str(value)[:20]}", lambda r, n=name, v=value: encode(r, **{n: v})


def read_everything(folder, path, planned, monkeypatch, capsys):
    """The texts, by request, that each reader of a store found in it."""
    found = {}
    store = CaptionStore(path)
    by_request = {record["request"]: record.get("edited_text", record["text"]) for record in store.current()}
    found["current"] = by_request
    found["done"] = {request: by_request[request] for request in store.done()}
    found["latest"] = {r["request"]: r.get("edited_text", r["text"]) for r in store.latest(planned)}
    by_video = {record["video"]: record["request"] for record in store.current()}
    merged = merge(folder)
    found["merge"] = {r["request"]: r.get("edited_text", r["text"]) for r in merged.store.current()}
    assert merged.num_ok + merged.num_errors + len(merged.problems) == len(planned)
    chosen = choose_records(store)
    report = export_dataset(store, "metadata-jsonl", folder / "out", overwrite=True)
    assert len(chosen) == len(report.table) == len(by_request)
    originals = {by_video[row.video]: row.original or None for row in report.table.itertuples()}
    found["export"] = originals
    gallery = write_gallery(store, order_by="mean_logprob")
    page = gallery.save(folder / "gallery.html").read_text()
    assert page.count("<article>") == len(by_request) and show_captions(store, store.current())
    table = pd.DataFrame(store.current())
    assert len(describe(table)) == len(agreement(table, "prompt")) == len(by_request)
    monkeypatch.setattr(sys, "argv", ["capkit", "show", str(path)])
    with pytest.raises(SystemExit, match="0"):
        capkit.__main__.main()
    shown = capsys.readouterr().out
    assert all(video in shown for video in by_video) and shown.count("\n/") == len(by_request)
    return found


def test_a_hundred_kinds_of_damage(tmp_path, monkeypatch, capsys):
    chance, kinds = random.Random(0), list(damages())
    assert len(kinds) > 100
    videos = [tmp_path / f"{number}.mp4" for number in range(6)]
    for number, video in enumerate(videos):
        video.write_bytes(b"not a video: %d" % number)
    records = [make_record(number, video) for number, video in enumerate(videos)]
    records[4] = an_error(records[4])
    edit = {"edits": records[0]["request"], "text": "By hand.", "created": "2026-11-26T12:00:00+00:00"}
    for start in range(0, len(kinds), 3):
        folder = tmp_path / str(start)
        folder.mkdir()
        path = folder / f"{Shard().name}.jsonl"
        write_plan(folder, Shard(), [], records, Prompt("Why?"))
        lines, bad, expected = [], [], {}
        for record in records:
            lines.append(encode(record))
            expected[record["request"]] = record["text"]
        lines.append(encode(edit))
        expected[records[0]["request"]] = "By hand."
        for _, damage in kinds[start : start + 3]:
            place = chance.randrange(len(lines) + 1)
            lines.insert(place, damage(make_record(99, tmp_path / "99.mp4")))
            bad = [*(number + (number > place) for number in bad), place + 1]
        path.write_bytes(b"\n".join(lines) + b"\n" * chance.randrange(2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read_everything(folder, path, [r["request"] for r in records], monkeypatch, capsys)
        names = [name for name, _ in kinds[start : start + 3]]
        for reader, texts in found.items():
            assert texts == expected, (reader, names)
        named = {
            int(n)
            for w in caught
            for n in re.findall(rf"^{re.escape(str(path))}, line (\d+) is skipped: .+", str(w.message))
        }
        assert named == set(bad), (names, [str(w.message)[:300] for w in caught])
