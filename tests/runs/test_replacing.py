"""Find and replace: previews write nothing, a batch counts as a whole or not at all, and can be taken back."""

import itertools
import json
import signal
import subprocess
import sys
import time
import warnings

import pytest
from store_records import an_error, make_record

import capkit
import capkit.runs.replacing
from capkit import CaptionStore, Prompt
from capkit.runs import Shard, StoreBusy, merge
from capkit.runs.shards import write_plan
from capkit.views import show_replacement

TEXTS = ["A red square.", "A red red dot.", "A blue line.", "Nothing."]


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for number, text in enumerate(TEXTS):
        prompt = "Why?" if number == 1 else "What?"
        store.append(make_record(number, tmp_path / f"{number}.mp4", text=f" {text}", prompt=prompt))
    store.append(an_error(make_record(4, tmp_path / "4.mp4"), "red herring"))
    return store


def request(number):
    return f"{number:020x}"


def texts(store):
    return [(record.get("edited_text") or record["text"] or "").strip() for record in store.current()]


class TestPreview:
    def test_it_counts_and_shows_and_writes_nothing(self, store):
        store.edit(request(2), "A line that is dark red.")
        before = store.path.read_bytes()
        preview = capkit.replace(store.path, r"\bred (?=\w)", "blue ")
        assert (preview.num_captions, preview.num_changed, preview.num_matches) == (4, 2, 3)
        assert preview.summary == r"'\bred (?=\w)' would be replaced in 2 of 4 captions, in 3 places"
        assert "0.mp4\n  A [-red -]{+blue +}square." in str(preview) and "2.mp4" not in str(preview)
        assert "A [-red -]{+blue +}[-red -]{+blue +}dot." in repr(preview)
        html = show_replacement(preview).html
        assert html.count("<s ") == html.count("<u ") == 3 and "Nothing is written yet" in html
        assert store.path.read_bytes() == before and len(list(store.path.parent.iterdir())) == 1

    def test_it_shows_the_first_ten(self, tmp_path):
        store = CaptionStore(tmp_path / "captions.jsonl")
        for number in range(12):
            store.append(make_record(number, tmp_path / f"{number}.mp4", text="A <b>dog</b>.\x1b[2J"))
        preview = capkit.replace(store, "dog", "<i>cat</i>")
        assert (
            str(preview).count("[-dog-]") == 10
            and str(preview).endswith("\n\nand 2 more")
            and "\x1b" not in str(preview)
        )
        html = show_replacement(preview).html
        assert html.count("&lt;i&gt;cat") == 10 and "and 2 more" in html and "<i>" not in html and "<b>dog" not in html

    @pytest.mark.parametrize(
        "pattern, replacement, where, message",
        [
            ("(red", "x", None, r"pattern='\(red': is no regular expression: missing \)"),
            ("red", r"\2", None, r"replacement='\\\\2': invalid group reference 2"),
            ("red", r"\g<name>", None, "replacement=.*: unknown group name 'name'"),
            ("x*", "y", None, "pattern='x\\*': matches where there is no character; use \\+ in place of \\*"),
            ("^", "The film: ", None, "matches where there is no character"),
            ("", "x", None, "matches where there is no character"),
            (r"\bred\b|\b", "x", None, "matches where there is no character"),
            (".*Nothing.*", "", None, "3.mp4: nothing would be left of 'Nothing.'"),
            ("red", "blue", {"promt": "Why?"}, "where: unknown column 'promt'; did you mean 'prompt'"),
            ("red", "blue", {"prompt": "Wherefore?"}, "holds no captions where {'prompt': 'Wherefore"),
            ("red", "\udc00", None, "half a character"),
            ("a{99999999999}", "x", None, "9}': is no regular expression: the repetition number is too large"),
            ("(" * 5000 + ")" * 5000, "x", None, "is no regular expression: maximum recursion depth"),
            (5, "x", None, "pattern=5: is no regular expression"),
            (b"red", "x", None, "bytes pattern"),
            ("red", str.upper, None, "replacement=.*upper.*: must be a text"),
        ],
    )
    def test_what_cannot_be_done_is_an_error_and_nothing_is_written(self, store, pattern, replacement, where, message):
        before = texts(store)
        with pytest.raises(ValueError, match=message):
            capkit.replace(store, pattern, replacement, where).write()
        assert texts(store) == before

    def test_a_store_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="none.jsonl: holds no captions"):
            capkit.replace(tmp_path / "none.jsonl", "a", "b")
        assert list(tmp_path.iterdir()) == []

    def test_nothing_that_matches_and_what_stays_the_same(self, store):
        for pattern, replacement in (("green", "blue"), ("red", "red"), ("(red)", r"\1")):
            preview = capkit.replace(store, pattern, replacement)
            assert preview.num_changed == 0 and "0 of 4 captions" in str(preview)
            with pytest.raises(ValueError, match="nothing to replace: .* 0 of 4 captions"):
                preview.write()

    def test_what_changes_nothing_any_more_is_no_batch(self, store):
        preview, num_lines = capkit.replace(store, "Nothing", "Something"), len(store.lines()) + 1
        store.edit(preview.first[0][0]["request"], "By hand.")
        with pytest.raises(ValueError, match="nothing to replace any more"):
            preview.write()
        assert len(store.lines()) == num_lines


class TestBatch:
    def test_new_texts_are_hand_edits_and_are_taken_back(self, store):
        store.edit(request(2), "A dark red line.")
        store.mark(request(0), "wrong", "red")
        before, lines = store.current()[:], store.path.read_bytes()
        batch = capkit.replace(store, "red", "green").write()
        assert texts(store) == ["A green square.", "A green green dot.", "A dark green line.", "Nothing.", ""]
        assert (batch.num_captions, batch.num_edited_since) == (3, 0)
        first, *_ = CaptionStore(store.path).current()
        assert first["text"] == " A red square." and first["mark"] == "outdated"
        assert store.path.read_bytes().startswith(lines)
        edits = [line for line in store.lines() if line.get("batch") == batch.id]
        assert [line["edits"] for line in edits] == [request(number) for number in range(3)]
        store.edit(request(1), "Better by hand.")
        taken = capkit.undo(store.path, batch.id)
        assert (taken.id, taken.num_captions, taken.num_edited_since) == (batch.id, 2, 1)
        after = store.current()
        assert (
            [after[n] for n in (0, 2, 3, 4)]
            == [before[n] for n in (0, 2, 3, 4)]
            == [CaptionStore(store.path).current()[n] for n in (0, 2, 3, 4)]
        )
        assert after[1]["edited_text"] == "Better by hand." and after[0]["mark"] == "wrong"
        with pytest.raises(ValueError, match=f"batch '{batch.id}' was taken back before"):
            capkit.undo(store, batch)
        with pytest.raises(ValueError, match="unknown batch 'abc'; to take back there are: none"):
            capkit.undo(store, "abc")

    def test_only_in_some_captions(self, store):
        store.mark(request(0), "wrong", "red")
        capkit.replace(store, "red", "green", where={"mark": "wrong"}).write()
        assert texts(store)[:2] == ["A green square.", "A red red dot."]
        capkit.replace(
            store, "(?i)A RED", "One red", where={"prompt": "Why?", "decoding": {"max_new_tokens": 2048}}
        ).write()
        assert texts(store)[1] == "One red red dot."
        capkit.replace(store, r"(\w+)\.$", r"\1!", where={"video": "*/[23].mp4"}).write()
        assert texts(store)[:4] == ["A green square.", "One red red dot.", "A blue line!", "Nothing!"]

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_batches_are_taken_back_in_any_order(self, store, order):
        steps = [texts(store)]
        batches = []
        for pattern, replacement in (("red", "red1"), ("red", "red2"), ("square", "box")):
            batches.append(capkit.replace(store, pattern, replacement).write())
            steps.append(texts(store))
        undone = set()
        for number in order:
            capkit.undo(store, batches[number])
            undone.add(number)
            latest_of_first = max((n for n in (0, 1, 2) if n not in undone), default=-1)
            latest_of_second = max((n for n in (0, 1) if n not in undone), default=-1)
            for again in (store, CaptionStore(store.path)):
                assert texts(again)[:2] == [steps[latest_of_first + 1][0], steps[latest_of_second + 1][1]]
        assert texts(store) == steps[0] and not any("edited_text" in record for record in store.current())

    def test_who_edits_while_a_batch_is_written_keeps_the_edit(self, store, monkeypatch):
        monkeypatch.setattr(capkit.runs.replacing, "LINES_AT_ONCE", 1)

        class Watched(CaptionStore):
            num_appended = 0

            def append(self, *lines):
                if "completes" in lines[0]:
                    CaptionStore(self.path).edit(request(2), "By hand, last of all.")
                super().append(*lines)
                self.num_appended += 1
                if self.num_appended == 1:
                    CaptionStore(self.path).edit(request(0), "By hand, after it was replaced.")
                    CaptionStore(self.path).edit(request(1), "By hand, before it is replaced.")

        watched = Watched(store.path)
        batch = capkit.replace(watched, r"A (?=\w)", "One ").write()
        expected = ["By hand, after it was replaced.", "By hand, before it is replaced.", "By hand, last of all."]
        assert texts(store)[:3] == texts(watched)[:3] == expected and batch.num_edited_since == 2
        capkit.undo(store, batch)
        assert texts(store)[:3] == expected

    def test_a_run_and_a_replacement_keep_each_other_out(self, store):
        preview = capkit.replace(store, "red", "green")
        with CaptionStore(store.path).hold(), pytest.raises(StoreBusy):
            preview.write()
        assert texts(store)[0] == "A red square."
        preview.write()
        assert texts(store)[0] == "A green square."

    def test_shards_batches_are_merged_and_taken_back(self, tmp_path):
        shard, records = Shard(), [make_record(n, tmp_path / f"{n}.mp4", text="A red dot.") for n in range(3)]
        write_plan(tmp_path, shard, [], records, Prompt())
        store = CaptionStore(tmp_path / f"{shard.name}.jsonl")
        for record in records:
            store.append(record)
        first = capkit.replace(store, "red", "green").write()
        second = capkit.replace(store, "dot", "spot", where={"video": "*0.mp4"}).write()
        merged = merge(tmp_path).store
        assert texts(merged) == ["A green spot.", "A green dot.", "A green dot."]
        merged.edit(request(1), "By hand.")
        assert capkit.undo(merged, first).num_captions == 1  # one was replaced again, one edited
        for _ in range(2):
            assert texts(merge(tmp_path).store) == ["A green spot.", "By hand.", "A red dot."]
        capkit.undo(merged.path, second)
        assert texts(merge(tmp_path).store) == ["A red dot.", "By hand.", "A red dot."]


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_cut_anywhere_a_batch_counts_as_a_whole_or_not_at_all(store, tmp_path):
    """Cut the file at many places of a batch, as a kill would; then replace again, edit, and take it back."""
    whole, before = store.path.read_bytes(), texts(store)
    capkit.replace(store, "red", "red red").write()
    both, after = store.path.read_bytes(), texts(store)
    assert after[:2] == ["A red red square.", "A red red red red dot."]
    for cut in [*range(len(whole), len(both) - 1, 11), len(both) - 2, len(both) - 1, len(both)]:
        store.path.write_bytes(both[:cut])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torn")
            again = CaptionStore(store.path)
            assert texts(again) == (after if cut >= len(both) - 1 else before)
            if cut < len(both) - 1:
                batch = capkit.replace(again, "red", "red red").write()
                assert texts(again) == texts(CaptionStore(store.path)) == after
                capkit.undo(again, batch)
                assert texts(again) == before


REPLACING = """
import sys, capkit
print("ready", flush=True)
preview = capkit.replace(sys.argv[1], "red", "red red")
print(preview.write().id, flush=True)
"""


@pytest.mark.filterwarnings("ignore:.*torn")
def test_killed_while_replacing_nothing_is_replaced_twice(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    lines = (make_record(number, tmp_path / f"{number}.mp4", text="A red dot.") for number in range(3000))
    store.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seconds in (0.05, 0.3, 0.6, 1.0, None):
        process = subprocess.Popen(
            [sys.executable, "-c", REPLACING, str(store.path)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        printed = process.stdout.read()
        process.wait()
        (text,) = set(texts(CaptionStore(store.path)))
        assert text in ("A red dot.", "A red red dot.") and (text == "A red red dot." or not printed)
        if text == "A red red dot.":
            break
    assert text == "A red red dot." and len(store.current()) == 3000
