"""Marks: lines of their own, of the text that was read; whoever is killed or marks at the same time, all are there."""

import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from store_records import an_error, make_record

import capkit.__main__
from capkit import CaptionStore, Prompt, find_clips, run_sweep
from capkit.runs import Shard, merge, select, unmerged
from capkit.runs.shards import write_plan
from capkit.views import captions_page, captions_table, show_captions

TEXT = "A red square moves to the left."


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for number in range(4):
        store.append(make_record(number, tmp_path / f"{number}.mp4", text=f" {TEXT}"))
    store.append(an_error(make_record(4, tmp_path / "4.mp4")))
    return store


def request(number):
    return f"{number:020x}"


def marks(store):
    return {int(record["request"], 16): record["mark"] for record in store.current() if "mark" in record}


def test_the_latest_mark_of_a_caption_counts_and_none_takes_it_away(store):
    before = store.path.read_bytes()
    store.mark(request(0), "wrong", words=("red", "to the  LEFT"), remark=" it is blue ")
    store.mark(store.current()[1], "unsure", words="square")
    assert store.path.read_bytes().startswith(before) and store.path.read_bytes().count(b"\n") == 7
    first, second, third, *_ = store.current()
    assert first == make_record(0, store.path.with_name("0.mp4"), text=f" {TEXT}") | {
        "mark": "wrong",
        "wrong_words": ["red", "to the LEFT"],
        "remark": "it is blue",
    }
    assert second["wrong_words"] == ["square"] and "mark" not in third and "remark" not in third
    store.mark(request(0), "right")
    assert marks(store) == {0: "right", 1: "unsure"} and store.current()[0]["wrong_words"] == []
    store.mark(request(0), None)
    assert marks(store) == {1: "unsure"} and marks(CaptionStore(store.path)) == {1: "unsure"}
    assert store.latest([request(1), request(0)])[0]["mark"] == "unsure"


def test_a_mark_is_of_the_text_that_was_read(store):
    for number in range(3):
        store.mark(request(number), "wrong", "red")
    seen = store.current()[3]
    store.edit(request(3), "A blue square.")  # while somebody reads the old text
    store.mark(seen, "wrong", "red", "blue")
    store.append(make_record(0, store.path.with_name("0.mp4"), text=f"{TEXT}  "))  # a rerun with the same answer
    store.append(make_record(1, store.path.with_name("1.mp4"), text="A blue square moves to the left."))
    store.edit(request(2), "A blue square.")
    assert marks(store) == {0: "wrong", 1: "outdated", 2: "outdated", 3: "outdated"}
    assert store.current()[3]["remark"] == "blue" and store.current()[3]["wrong_words"] == ["red"]
    store.edit(request(2), TEXT)
    assert marks(store)[2] == "wrong"
    store.mark(request(1), "right")
    assert marks(store)[1] == "right"


def test_what_cannot_be_marked_is_refused_and_nothing_is_written(store):
    before = store.path.read_bytes()
    for arguments, message in (
        ((request(0), "wrnog"), "mark='wrnog': must be one of 'right', 'wrong', 'unsure', or None"),
        ((request(0), "outdated"), "mark='outdated': must be one of"),
        ((request(0), "wrong", ("blue",)), "words: 'blue' is not in the caption"),
        ((request(0), "wrong", "squar"), "words: 'squar' is not in the caption"),
        ((request(0), "right", ("red",)), "words=\\['red'\\]: are for captions that are wrong, and mark='right'"),
        ((request(0), None, ("red",)), "are for captions that are wrong, and mark=None"),
        ((request(4), "wrong"), f"request '{request(4)}' has no caption to mark: the file is empty"),
        ((request(9), "wrong"), f"{store.path} has no request '{request(9)}' to mark"),
        ((make_record(9, store.path), "wrong"), f"has no request '{request(9)}' to mark"),
        ((request(0), "wrong", (), "\udc00"), "the remark has half a character in it"),
    ):
        with pytest.raises(ValueError, match=message):
            store.mark(*arguments)
    store.edit(request(0), "")
    with pytest.raises(ValueError, match="has no caption to mark: its text is empty"):
        store.mark(request(0), "wrong")
    assert store.path.read_bytes().startswith(before) and store.path.read_bytes().count(b"\n") == 6


def test_a_torn_mark_is_skipped_and_what_follows_counts(store):
    whole = store.path.read_bytes()
    store.mark(request(0), "wrong", "red")
    both = store.path.read_bytes()
    for cut in range(len(whole) + 1, len(both) - 1, 7):
        store.path.write_bytes(both[:cut])
        with pytest.warns(UserWarning, match="line 6 is skipped: torn"):
            again = CaptionStore(store.path)
            assert marks(again) == {}
            again.mark(request(1), "right")
            assert marks(again) == {1: "right"} and len(again.current()) == 5


def test_a_mark_goes_over_to_a_copy_of_the_same_content(tmp_path):
    for same in (True, False):
        store = CaptionStore(tmp_path / f"{same}.jsonl")
        for number in (1, 2):
            sha256 = "same" if same else str(number)
            store.append(make_record(number, tmp_path / "a.mp4", video_sha256=sha256, text=TEXT))
            if number == 1:
                store.mark(request(1), "wrong", "red")
        (record,) = store.current()
        assert record["request"] == request(2) and record.get("mark") == ("wrong" if same else None)


def test_shards_marks_are_merged_once(tmp_path):
    shard, records = Shard(), [make_record(number, tmp_path / f"{number}.mp4", text=TEXT) for number in range(3)]
    write_plan(tmp_path, shard, [], records, Prompt())
    store = CaptionStore(tmp_path / f"{shard.name}.jsonl")
    for record in records:
        store.append(record)
    store.mark(request(0), "wrong", "red")
    store.mark(request(1), "right")
    merged = merge(tmp_path).store
    assert marks(merged) == {0: "wrong", 1: "right"} and unmerged(tmp_path) == []
    store.mark(request(1), "wrong")
    store.mark(request(2), "unsure")
    ((_, lacking),) = unmerged(tmp_path)
    assert [record["request"] for record in lacking] == [request(1), request(2)]
    merged.mark(request(0), None)
    for _ in range(2):
        merged = merge(tmp_path).store
        assert marks(merged) == {1: "wrong", 2: "unsure"}
    lines = merged.path.read_bytes()
    assert merge(tmp_path).store.path.read_bytes() == lines and lines.count(b'"marks"') == 5


def test_every_view_shows_marks_and_filters_by_them(store, monkeypatch, capsys):
    store.mark(request(0), "wrong", "red", "it is <b>blue</b>")
    store.mark(request(1), "right")
    store.mark(request(2), "unsure")
    store.edit(request(2), "Another.")
    wrong, right, outdated, *_ = records = store.current()
    shown = show_captions(store, records).html
    assert "✗ marked wrong (red): it is &lt;b&gt;blue&lt;/b&gt;" in shown and "✓ marked right<" in shown
    assert "↻ marked before the text changed<" in shown and "<b>blue</b>" not in shown
    table = captions_table(records).html
    assert table.count("wrong words") == 1 and "<b>blue</b>" not in table
    assert "wrong words" not in captions_table(records[3:]).html
    gallery = captions_page(store, where={"mark": "wrong"})
    assert gallery.records == [wrong] and "1 of 5 captions in captions.jsonl; mark wrong" in gallery.summary
    assert select(records, {"mark": ""}) == records[3:] and select(records, {"mark": "?*"}) == records[:3]
    assert select(records, {"mark": "right"}) == [right] and select(records, {"mark": "outdated"}) == [outdated]

    def printed(*arguments):
        monkeypatch.setattr(sys, "argv", ["capkit", "show", str(store.path), *arguments])
        with pytest.raises(SystemExit) as ended:
            capkit.__main__.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    code, text = printed()
    assert code == 0 and "0.mp4\n  A red square moves to the left.\n  marked wrong (red): it is <b>blue" in text
    assert "4.mp4\n  error" in text
    code, text = printed("--mark", "right")
    assert code == 0 and "1.mp4\n" in text and "0.mp4\n" not in text and "4.mp4\n" not in text
    code, text = printed("--mark", "wrong", "--where", "status=error")
    assert code == 0 and text == f"{store.path}: no captions where {{'status': 'error', 'mark': 'wrong'}}\n"
    assert printed("--mark", "rihgt")[0] == 2


def test_a_sweeps_table_has_the_marks_of_the_models_texts(captioner, tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    axes = {"prompts": ["Why?", "What?", "Who?"], "decodings": [{"max_new_tokens": 3}]}
    sweep = partial(run_sweep, captioner, find_clips("demo", limit=1), store=store, **axes)
    first, second, _ = sweep().records
    assert "mark" not in sweep().to_frame()
    for record in (first, second):
        store.mark(record, "wrong", remark="no")
    store.edit(second["request"], "By hand.")
    store.mark(second["request"], "right")  # of the text by hand, which the table does not have
    table = sweep().to_frame()
    assert list(table["mark"].fillna("")) == ["wrong", "", ""] and table["remark"][0] == "no"
    assert table["wrong_words"][0] == "" and len(table.drop_duplicates()) == 3


# ---- several at once, and killed -------------------------------------------------------------------------------------

MARKING = """
import sys
from capkit.runs import CaptionStore
store = CaptionStore(sys.argv[1])
mine, of = int(sys.argv[2]), int(sys.argv[3])
for number, record in enumerate(store.current()):
    if number % of == mine and "mark" not in record:
        store.mark(record, "wrong" if number % 2 else "right", remark=str(number))
        print(number, flush=True)
"""


@pytest.fixture
def large(tmp_path):
    store = CaptionStore(tmp_path / "large.jsonl")
    lines = (make_record(number, tmp_path / f"{number}.mp4", text=TEXT) for number in range(400))
    store.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return store


def start(store, mine=0, of=1):
    command = [sys.executable, "-c", MARKING, str(store.path), str(mine), str(of)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_mark_at_the_same_time(large):
    processes = [start(large, mine, 4) for mine in range(4)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert marks(large) == {number: "wrong" if number % 2 else "right" for number in range(400)}
    assert [record["remark"] for record in large.current()] == [str(number) for number in range(400)]
    lines = large.path.read_bytes().split(b"\n")  # an empty one comes between two processes that write at once
    assert len([line for line in lines if line]) == len(large.lines()) == 800


@pytest.mark.filterwarnings("ignore:.*torn")
def test_killed_while_marking_all_that_was_marked_is_there_once(large):
    """After each kill the marks that were printed are there; the next run goes on, and marks nothing a second time."""
    printed = []
    for seconds in (0.0, 0.05, 0.3, None):
        process = start(large)
        if seconds is not None:
            printed.append(int(process.stdout.readline()))
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        printed += [int(line) for line in process.stdout if line.endswith("\n")]
        process.wait()
        assert set(printed) <= marks(CaptionStore(large.path)).keys()
    assert marks(large) == {number: "wrong" if number % 2 else "right" for number in range(400)}
    made = [line["marks"] for line in large.lines() if "marks" in line]
    assert len(made) == len(set(made)) == 400
