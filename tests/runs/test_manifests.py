"""Tables of clips as people have them: every form gives the same items, and a bad row stops none of the others."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from video_factory import encode_clip

import capkit
from capkit import CaptionStore
from capkit.runs import Item, caption_clips, cut_into, find_clips

FEW = capkit.Decoding(max_new_tokens=2)
HALF = "\ud83d"  # the first half of an emoji


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate("abc"):
        encode_clip(folder / f"{name}.mp4", range(20 * number, 20 * number + 20), fps=10)
    (folder / "text.mp4").write_text("no video")
    return folder


def read(path):
    """The items that a manifest gives, and what the warnings say, but not of files that are not there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = find_clips(path)
    assert all(warning.filename == __file__ for warning in caught)
    said = [str(warning.message) for warning in caught]
    return items, [message for message in said if "there is no such file as" not in message]


# The table of `CSV` in each form. Texts that look like numbers or like nothing stay texts.
ROWS = [
    {"video": "001.mp4", "prompt": "1e5", "reference": "NA", "start": 1.5, "end": 4},
    {"video": "sub/b, c.mp4", "prompt": 'Why, "so"?\nOr not; so?', "reference": "001", "start": None, "end": None},
    {"video": "ä.mp4", "prompt": None, "reference": None, "start": 0, "end": 2},
]
CSV = (
    "video,prompt,reference,start,end\n001.mp4,1e5,NA,1.5,4\n"
    '"sub/b, c.mp4","Why, ""so""?\nOr not; so?",001,,\nä.mp4,,,0,2\n'
)


def items_of(folder):
    return [
        Item(str(folder / "001.mp4"), "1e5", "NA", 1.5, 4.0),
        Item(str(folder / "sub/b, c.mp4"), 'Why, "so"?\nOr not; so?', "001"),
        Item(str(folder / "ä.mp4"), None, None, 0.0, 2.0),
    ]


def semicolons():
    return (
        CSV.replace("video,prompt,reference,start,end", "video;prompt;reference;start;end")
        .replace("001.mp4,1e5,NA,1.5,4", "001.mp4;1e5;NA;1.5;4")
        .replace(',"Why', ';"Why')
        .replace('",001,,', '";001;;')
        .replace("ä.mp4,,,0,2", "ä.mp4;;;0;2")
    )


FORMS = {
    "plain.csv": CSV,
    "byte order mark.csv": "\ufeff" + CSV,
    "utf-16.csv": CSV.encode("utf-16"),
    "Windows line ends.csv": CSV.replace("\n0", "\r\n0").replace("\nä", "\r\nä").replace('\n"s', '\r\n"s'),
    "empty lines.csv": "\n" + CSV.replace("\n0", "\n\n,,,,\n \n0").replace("\nä", "\n\nä") + "\n\n",
    "spaces.csv": CSV.replace("o,p", "o, p")
    .replace("t,r", "t , r")
    .replace(",1e5,NA,", ", 1e5,  NA, ")
    .replace(',"Why', ', "Why'),
    "nan.csv": CSV.replace(",001,,", ",001,nan,NaN").replace("ä.mp4,,,", "ä.mp4,NaN,nan,"),
    "semicolons.csv": semicolons(),
    "decimal commas.csv": semicolons().replace("1.5;4", " 1,5;4,0").replace(";0;2", ";0,0;2,000"),
    "tabs.csv": semicolons().replace("; so", "SO").replace(";", "\t").replace("SO", "; so"),
    "tabs.tsv": semicolons().replace("; so", "SO").replace(";", "\t").replace("SO", "; so"),
    "lines.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "empty and Windows lines.jsonl": "\ufeff\r\n" + "\r\n\r\n".join(json.dumps(row) for row in ROWS),
    "nan.jsonl": "".join(json.dumps(row).replace("null", "NaN") + "\n" for row in ROWS),
    "list.json": json.dumps(ROWS, indent=1),
    "nan.json": json.dumps(ROWS, ensure_ascii=False).replace("null", "NaN"),
}


NAMES_OF_COLUMNS = [("file_name", "caption"), ("Filename", "text"), ("path", "text"), ("Video", " Reference")]


class TestForms:
    @pytest.mark.parametrize("name", FORMS)
    def test_each_gives_the_same_items(self, tmp_path, name):
        content = FORMS[name]
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert read(tmp_path / name) == (items_of(tmp_path), [])

    def test_pandas_writes_and_keeps_them(self, tmp_path, monkeypatch):
        frame = pd.DataFrame(ROWS)
        frame.to_csv(tmp_path / "a.csv", index=False)
        frame.to_csv(tmp_path / "nan.csv", index=False, na_rep="NaN")
        frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
        frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
        frame.to_json(tmp_path / "a.json", orient="records")
        frame.to_parquet(tmp_path / "a.parquet")
        for name in ("a.csv", "nan.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"):
            assert read(tmp_path / name) == (items_of(tmp_path), [])
        frame["video"] = [str(tmp_path / name) for name in frame["video"]]
        for table in (frame, frame.astype(object), frame.convert_dtypes()):
            for videos in (table, table.to_dict("records"), [table]):
                assert read(videos) == (items_of(tmp_path), [])
        monkeypatch.chdir(tmp_path)  # where relative paths begin
        assert find_clips(pd.DataFrame({"video": ["x.mp4", "y.mp4"]})) == [Item("x.mp4"), Item("y.mp4")]
        for name in "xy":
            (tmp_path / f"{name}.mp4").touch()
        assert find_clips(pd.Series(["x.mp4", "y.mp4"])) == [Item("x.mp4"), Item("y.mp4")]
        with pytest.raises(ValueError, match="share a name"):
            find_clips(pd.DataFrame([["a.mp4", "b.mp4"]], columns=["video", "video"]))
        with pytest.raises(ValueError, match="no videos found"):
            find_clips(pd.DataFrame({"video": []}))

    @pytest.mark.parametrize("video, reference", NAMES_OF_COLUMNS)
    def test_other_names_of_columns_are_one_warning(self, tmp_path, video, reference):
        (tmp_path / "a.csv").write_text(f"{video},{reference},fps,id\nx.mp4,A star.,25,7\ny.mp4,,25,8\n")
        items, (said,) = read(tmp_path / "a.csv")
        first = Item(str(tmp_path / "x.mp4"), None, "A star.", columns={"fps": "25", "id": "7"})
        assert items == [first, Item(str(tmp_path / "y.mp4"), columns={"fps": "25", "id": "8"})]
        for words in (f"column {video} is read as video", "as reference", "ignored columns ['fps', 'id']", "a.csv"):
            assert words in said
        assert "video (or file_name, filename, path), prompt, reference (or caption, text), start, end" in said

    def test_the_first_choice_of_two_names_counts(self, tmp_path):
        (tmp_path / "a.csv").write_text("path,text,video,caption\nno.mp4,no,x.mp4,A star.\nno.mp4,no,y.mp4,\n")
        items, (said,) = read(tmp_path / "a.csv")
        others = {"columns": {"path": "no.mp4", "text": "no"}}
        first = Item(str(tmp_path / "x.mp4"), None, "A star.", **others)
        assert items == [first, Item(str(tmp_path / "y.mp4"), **others)]
        assert "column caption is read as reference; ignored columns ['path', 'text']" in said

    def test_file_names_that_are_not_utf_8(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"video,prompt\ncaf\xe9.mp4,\ny.mp4,\n")
        (tmp_path / "a.jsonl").write_bytes(b'{"video": "caf\\udce9.mp4"}\n{"video": "y.mp4"}\n')
        for name in ("a.csv", "a.jsonl"):
            assert read(tmp_path / name)[0][0] == Item(str(tmp_path / "caf\udce9.mp4"))


NAN = float("nan")
B = {"video": "b.mp4"}
# A row between two good ones, and words of its error.
BAD_ROWS = [
    ({}, "column video: is empty"),
    ({"prompt": "Why?"}, "column video: is empty"),
    ({"video": None}, "column video: is empty"),
    ({"video": " "}, "column video: is empty"),
    ({"video": NAN, "prompt": NAN}, "column video: is empty"),
    ({"video": 5}, "column video: must be a file name, not 5"),
    ({"video": True}, "column video: must be a file name, not True"),
    ({"video": ["b.mp4"]}, "column video: must be a file name, not ['b.mp4']"),
    ({"video": {"path": "b.mp4"}}, "column video: must be a file name, not {"),
    ({"video": "b\0.mp4"}, "b\\x00.mp4' cannot be the name of a file"),
    ({"video": f"b{HALF}.mp4"}, "column video: "),
    ({"video": "https://" + "x" * 20_000_000}, "cannot be the name of a file"),
    ({"video": "https://example.org/b.mp4"}, "column video: 'https://example.org/b.mp4' is an address; download it"),
    (B | {"prompt": 5}, "column prompt: prompt=5: must be a text"),
    (B | {"prompt": 0.5}, "column prompt: prompt=0.5: must be a text"),
    (B | {"prompt": True}, "column prompt: prompt=True: must be a text"),
    (B | {"prompt": ["Why?"]}, "column prompt: prompt=['Why?']: must be a text"),
    (B | {"prompt": {"text": "Why?"}}, "column prompt: prompt={'text': 'Why?'}: must be a text"),
    (B | {"prompt": f"Why{HALF}?"}, "column prompt: 'Why\\ud83d?' is not UTF-8, or was cut"),
    (B | {"prompt": "x" * 10_000_000}, "has 10000000 characters, more than"),
    (B | {"reference": 5}, "column reference: must be a text, not 5"),
    (B | {"reference": ["A star."]}, "column reference: must be a text, not ['A star.']"),
    (B | {"reference": f"A star {HALF}"}, "column reference: 'A star \\ud83d' is not UTF-8, or was cut"),
    (B | {"start": "soon"}, "column start: start_seconds must be a number, such as 2.5; got 'soon'"),
    (B | {"start": "1_0"}, "column start: start_seconds must be a number, such as 2.5; got '1_0'"),
    (B | {"start": "00:01"}, "column start: start_seconds must be"),
    (B | {"start": -1}, "column start: start_seconds must be"),
    (B | {"start": "-0.5"}, "column start: start_seconds must be"),
    (B | {"start": float("inf")}, "column start: start_seconds must be"),
    (B | {"start": "inf"}, "column start: start_seconds must be"),
    (B | {"start": "1e999"}, "column start: start_seconds must be"),
    (B | {"start": 10**400}, "column start: start_seconds must be"),
    (B | {"start": True}, "column start: start_seconds must be"),
    (B | {"start": [1]}, "column start: start_seconds must be"),
    (B | {"end": "late"}, "column end: end_seconds must be a number, such as 2.5; got 'late'"),
    (B | {"end": 0}, "column end: end_seconds must be"),
    (B | {"end": -1}, "column end: end_seconds must be"),
    (B | {"end": float("inf")}, "column end: end_seconds must be"),
    (B | {"end": {}}, "column end: end_seconds must be"),
    (B | {"start": 1, "end": 1}, "column end: end_seconds must be"),
    (B | {"start": "1.5", "end": "0.5"}, "column end: end_seconds must be"),
    (B | {"start": -1, "prompt": 5}, "column prompt: prompt=5: must be a text that is not empty; start: "),
    (["b.mp4"], "must be an object with the column video, not ['b.mp4']"),
    ("b.mp4", "must be an object with the column video, not 'b.mp4'"),
    (5, "must be an object with the column video, not 5"),
    (None, "must be an object with the column video, not None"),
    (B | {"prompt": "<|reserved_special_token_0|>?"}, "marks the frames' positions"),
    (B | {"start": 9}, "no frame starts between 9 s"),
    ({"video": "gone.mp4"}, "no such file"),
    ({"video": "x" * 5000 + ".mp4"}, "no such file"),
    ({"video": "x/" * 20_000 + "b.mp4"}, "cannot be the name of a file"),
    (B | {"reference": "x" * 200_001}, "column reference: has 200,001 characters; 200,000 are the most"),
    ({"video": "~nobody/b.mp4"}, "no such file"),
    ({"video": "."}, "is a folder, not a video"),
    ({"video": "text.mp4"}, "text.mp4"),
]
BAD_LINES = [
    (b"b.mp4,Why, and how?,,,", "column end: followed by 1 more, ''; put quotation marks around a text with ','"),
    (b"b.mp4,Why?,A star, red, and a dog,0,1", "column end: "),
    (b"b.mp4,Caf\xe9?,,,", "column prompt: 'Caf\\udce9?' is not UTF-8; save the file as UTF-8"),
    (b"b.mp4,,Caf\xe9,,", "column reference: 'Caf\\udce9' is not UTF-8"),
    (b'b.mp4,"Why?,,,', "not valid CSV"),
    (b'b.mp4,"Why "so"?",,,', "not valid CSV"),
    (b'b.mp4,,,"1,5",', "column start: start_seconds must be a number, such as 2.5; got '1,5'; write 1.5"),
    (b"b.mp4,,,,0", "column end: end_seconds must be"),
    (b",Why?", "column video: is empty"),
    (b"b\0.mp4,,,,", ""),
    (b"b.mp4," + b"x" * 10_000_000 + b",,,", "has 10000000 characters, more than"),
]


def caption_one_bad_row(captioner, manifest, store, words, place):
    """The two good clips of three are captioned; the error is told at once unless it needs the model or the file."""
    items, said = read(manifest)
    assert len(items) == 3 and (items[0].error, items[2].error) == (None, None)
    if items[1].error is not None:
        (warning,) = said
        assert warning.startswith("1 of 3 clips get a record with an error") and items[1].error in warning
        assert items[1].error.startswith(f"{place}, ") and len(items[1].error) < 1000
    records = caption_clips(captioner, items, CaptionStore(store), decoding=FEW, timeout_seconds=None)
    assert [record["status"] for record in records] == ["ok", "error", "ok"]
    assert words in records[1]["error"]
    again = CaptionStore(store)
    in_order = sorted(records, key=lambda record: "is_row_error" in record)  # rows that cannot be used come last
    assert again.current() == in_order and len(again.done()) == 3
    return items, records


class TestBadRows:
    @pytest.mark.parametrize("row, words", BAD_ROWS, ids=lambda value: repr(value)[:60])
    def test_one_among_good_ones(self, captioner, folder, tmp_path, row, words):
        manifest = folder / "list.jsonl"
        rows = [{"video": "a.mp4"}, row, {"video": "c.mp4", "prompt": "Why?"}]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        place = f"{manifest}, row 2 (line 2)"
        items, records = caption_one_bad_row(captioner, manifest, tmp_path / "c.jsonl", words, place)
        late = ("marks", "no frame", "no such file", "is a folder", "text.mp4")
        assert words.startswith(late) == (items[1].error is None)
        assert [records[0]["video"], records[2]["video"]] == [str(folder / "a.mp4"), str(folder / "c.mp4")]
        assert records[2]["prompt"] == "Why?"

    @pytest.mark.parametrize("line", ['{"video": "b.mp4"', "[" * 100_000, '{"start": ' + "1" * 5000 + "}", "b.mp4"])
    def test_a_line_that_is_not_json(self, folder, line):
        """The file is damaged or cut short: nothing of it is captioned."""
        manifest = folder / "list.jsonl"
        manifest.write_text('{"video": "a.mp4"}\n\n' + line + '\n{"video": "c.mp4"}\n')
        with pytest.raises(ValueError, match=r"list.jsonl: .*row 2 \(line 3\), not valid JSON: .*; a row is one line"):
            find_clips(manifest)

    def test_an_address_is_recorded_as_it_is_in_the_row(self, captioner, folder, tmp_path):
        address = "http://127.0.0.1:9/x.mp4?a=~b//c"
        (folder / "list.jsonl").write_text(json.dumps({"video": address}) + '\n{"video": "a.mp4"}\n')
        items, _ = read(folder / "list.jsonl")
        caption_clips(captioner, items, tmp_path / "c.jsonl", decoding=FEW)
        bad, good = sorted(CaptionStore(tmp_path / "c.jsonl").current(), key=lambda record: record["status"])
        assert bad["video"] == address and "only local files can be read" in bad["error"]
        assert good["video"] == str(folder / "a.mp4")

    def test_a_prompt_of_nothing_is_an_empty_cell(self, captioner, folder, tmp_path):
        (folder / "list.jsonl").write_text('{"video": "a.mp4", "prompt": ""}\n{"video": "c.mp4", "prompt": "  "}\n')
        items, said = read(folder / "list.jsonl")
        records = caption_clips(captioner, items, tmp_path / "c.jsonl", "The shared one?", FEW)
        assert [record["prompt"] for record in records] == ["The shared one?"] * 2 and said == []

    @pytest.mark.parametrize("line, words", BAD_LINES, ids=lambda value: repr(value)[:60])
    def test_one_among_good_lines(self, captioner, folder, tmp_path, line, words):
        manifest = folder / "list.csv"
        manifest.write_bytes(b"video,prompt,reference,start,end\na.mp4,,,,\n" + line + b"\nc.mp4,Why?,,,1\n")
        place = f"{manifest}, row 2 (line 3)"
        items, records = caption_one_bad_row(captioner, manifest, tmp_path / "c.jsonl", words, place)
        assert items[1].error is not None
        assert items[2] == Item(str(folder / "c.mp4"), "Why?", None, 0.0, 1.0)

    def test_the_same_clip_in_good_and_bad_rows_and_after_mending(self, captioner, folder, tmp_path):
        """The error of one row is not taken for the answer to another."""
        store, manifest = CaptionStore(tmp_path / "c.jsonl"), folder / "list.csv"
        manifest.write_text("video,start\na.mp4,-1\na.mp4,\na.mp4,soon\n")
        items, _ = read(manifest)
        records = caption_clips(captioner, items, store, decoding=FEW)
        assert [record["status"] for record in records] == ["error", "ok", "error"]
        manifest.write_text("video,start\na.mp4,1\na.mp4,\na.mp4,0.5\n")
        records = caption_clips(captioner, find_clips(manifest), store, decoding=FEW)
        assert [record["start_seconds"] for record in records if record["status"] == "ok"] == [1.0, 0.0, 0.5]

    def test_the_error_of_a_row_is_shown_until_it_is_mended(self, captioner, folder, tmp_path):
        shown, settings = CaptionStore(tmp_path / "c.jsonl"), {"decoding": FEW, "batch_size": 2}

        def run(*rows, **changed):
            (folder / "list.csv").write_text("\n".join(["video,prompt,start", *rows]))
            items, _ = read(folder / "list.csv")
            caption_clips(captioner, items, CaptionStore(shown.path), **settings | changed)
            assert shown.current() == CaptionStore(shown.path).current()  # read on, and read from the beginning
            return [(Path(r["video"]).name, r["status"], r["start_seconds"]) for r in shown.current()]

        bad, bad_b = ("a.mp4", "error", 0.0), ("b.mp4", "error", 0.0)
        good = [("a.mp4", "ok", 0.0), ("b.mp4", "ok", 1.0)]  # of the same videos, and beside their rows' errors
        assert run("a.mp4,,soon", "a.mp4,,", "b.mp4,,-1", "b.mp4,,1") == [*good, bad, bad_b]
        assert run("a.mp4,,soon", "a.mp4,Why?,1", "b.mp4,,1", frame_sampling="base").count(bad) == 2  # other settings
        assert run("a.mp4,,0.5", "a.mp4,,", "b.mp4,,-1").count(bad) == 1  # that of the other settings
        assert bad_b in run("b.mp4,,-1", "c.mp4,,")
        assert bad_b not in run("b.mp4,How?,0.25", "c.mp4,,")
        assert run("a.mp4,Who?,soon", "c.mp4,,").count(bad) == 2  # wrong again

    def test_of_dictionaries_and_frames(self, folder):
        good = {"video": str(folder / "a.mp4")}
        for videos in ([good, good | {"start": -1}, good], pd.DataFrame([good, good | {"start": -1}, good])):
            items, (said,) = read(videos)
            assert [item.error is None for item in items] == [True, False, True]
            assert ", row 2, column start: start_seconds must be" in items[1].error and items[1].error in said
        items, (said,) = read([good, good | {"promt": "Why?"}])
        assert "row 2, must have 'video'" in said and "nothing else; not ['promt']" in items[1].error
        with pytest.raises(ValueError, match="none of 2 clips can be captioned: videos, row 1, column start"):
            find_clips([good | {"start": -1}, good | {"start": -2}])
        items, _ = read([good | {"start": np.float32(0.5), "end": np.int64(2)}])
        assert (items[0].start, items[0].end) == (0.5, 2.0) and type(items[0].end) is float

    def test_names_in_place_of_items_are_refused(self, captioner, tmp_path):
        for items in ("clip.mp4", tmp_path / "clip.mp4", ["clip.mp4"], [None]):
            with pytest.raises(TypeError, match="is not an Item; find_clips makes items of files"):
                caption_clips(captioner, items, tmp_path / "c.jsonl")
            with pytest.raises(TypeError, match="is not an Item; find_clips makes items of files"):
                cut_into(items, 10)

    def test_items_made_by_hand(self, captioner, folder, tmp_path):
        good = Item(str(folder / "a.mp4"))
        bad = [Item(3), Item(good.video, ["Why?"]), Item(good.video, start=NAN), Item(good.video, end={})]
        records = caption_clips(captioner, [good, *bad], CaptionStore(tmp_path / "c.jsonl"), decoding=FEW)
        assert [record["status"] for record in records] == ["ok"] + ["error"] * 4
        for record, word in zip(records[1:], ("file name", "['Why?']", "nan", "{}"), strict=True):
            assert word in record["error"]

    def test_a_text_among_videos(self, folder):
        (folder / "notes.txt").write_text("Nothing to see here.")
        items, (said,) = read([folder / "a.mp4", folder / "notes.txt"])
        assert items[0].error is None and "notes.txt: is a text, not a video" in said
