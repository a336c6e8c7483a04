"""Many clips into a store: which clips, bad ones among them, kills, retries, memory."""

import json
import signal
import subprocess
import sys
import time
from random import Random

import pytest
import torch
from conftest import GOLDEN
from video_factory import cut, encode_clip

import capkit
from capkit import CaptionStore, Decoding
from capkit.shards import Item, caption_clips, find_clips

FEW = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def eight_clips(tmp_path_factory):
    """Five good clips, one of them AV1; an empty file, one cut short, a text file named .mp4."""
    folder = tmp_path_factory.mktemp("eight clips")
    for index, seconds in enumerate((2, 3, 1, 4)):
        encode_clip(folder / f"good {index}.mp4", range(10 * index, 10 * index + seconds * 10), fps=10)
    encode_clip(folder / "modern.mkv", range(20), fps=10, codec="libsvtav1")
    (folder / "empty.mp4").touch()
    cut(folder / "good 3.mp4", folder / "short.mp4", 0.6)
    (folder / "text.mp4").write_text("These are not the frames you are looking for.\n" * 100)
    (folder / "notes.txt").write_text("not a video, and not named like one")
    return folder


class TestFindClips:
    def test_folder_glob_file_and_list(self, tmp_path):
        for name in ("b.mp4", "a.MOV", "notes.txt", "sub/c.webm", "sub/d d.mkv"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        assert [item.video for item in find_clips(tmp_path)] == [
            str(tmp_path / name) for name in ("a.MOV", "b.mp4", "sub/c.webm", "sub/d d.mkv")
        ]
        assert find_clips(f"{tmp_path}/*.mp4") == [Item(str(tmp_path / "b.mp4"))]
        assert len(find_clips(f"{tmp_path}/**/*.*")) == 5
        assert [item.video for item in find_clips([f"{tmp_path}/sub", tmp_path / "b.mp4"], limit=2)] == [
            str(tmp_path / "sub/c.webm"),
            str(tmp_path / "sub/d d.mkv"),
        ]

    def test_a_file_that_is_not_there_is_kept_to_be_reported(self, tmp_path):
        assert find_clips(["missing.mp4", str(tmp_path / "[1].mp4")])[0] == Item("missing.mp4")

    def test_a_name_with_glob_characters(self, tmp_path):
        (tmp_path / "take [1].mp4").touch()
        assert find_clips(tmp_path / "take [1].mp4") == [Item(str(tmp_path / "take [1].mp4"))]

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_manifest(self, tmp_path, kind):
        path = tmp_path / f"list.{kind}"
        if kind == "csv":
            path.write_text(
                "video,prompt,reference,start,end\n007.mp4,,,,\n"
                'sub/b.mp4,"Why, ""so""?",None,1.5,4\n/abs/c.mp4,NA,null,,2\n'
            )
        else:
            rows = [
                {"video": "007.mp4"},
                {"video": "sub/b.mp4", "prompt": 'Why, "so"?', "reference": "None", "start": 1.5, "end": 4},
                {"video": "/abs/c.mp4", "prompt": "NA", "reference": "null", "end": 2},
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert find_clips(path) == [
            Item(str(tmp_path / "007.mp4")),
            Item(str(tmp_path / "sub/b.mp4"), 'Why, "so"?', "None", 1.5, 4.0),
            Item("/abs/c.mp4", "NA", "null", 0.0, 2.0),
        ]

    @pytest.mark.parametrize(
        "name, content, told",
        [
            ("a.csv", "file,prompt\nx.mp4,\n", "has no column 'video'"),
            ("a.csv", "", "no videos found"),
            ("a.csv", "video\n\x00\xff", "cannot be read as a manifest"),
            ("a.jsonl", "[1]\n", "cannot be read as a manifest"),
            ("a.jsonl", "{broken", "cannot be read as a manifest"),
            ("a.csv", "video,start\nx.mp4,soon\n", "start and end must be seconds"),
            ("a.csv", "video\n", "no videos found"),
        ],
    )
    def test_bad_manifests(self, tmp_path, name, content, told):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError) as error:
            find_clips(tmp_path / name)
        assert told in str(error.value) and name in str(error.value)

    def test_misspelt_columns_are_named(self, tmp_path):
        (tmp_path / "a.csv").write_text("video,promt\nx.mp4,Why?\n")
        with pytest.warns(UserWarning, match=r"ignored columns \['promt'\]; known: video, prompt"):
            find_clips(tmp_path / "a.csv")
        with pytest.raises(ValueError, match="nothing else"):
            find_clips([{"video": "x.mp4", "promt": "Why?"}])

    def test_nothing_found(self, tmp_path):
        for videos in (tmp_path, f"{tmp_path}/*.mp4", []):
            with pytest.raises(ValueError, match="no videos found"):
                find_clips(videos)
        with pytest.raises(ValueError, match="limit=0"):
            find_clips("x.mp4", limit=0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_five_are_captioned_and_three_recorded_as_errors(captioner, eight_clips, tmp_path, batch_size):
    store = CaptionStore(tmp_path / "captions.jsonl")
    records = caption_clips(captioner, find_clips(eight_clips), store, decoding=FEW, batch_size=batch_size)
    assert [record["video"] for record in records] == [item.video for item in find_clips(eight_clips)]
    assert len(records) == 8 and sorted(map(str, records)) == sorted(map(str, store.current()))
    good = {r["video"] for r in records if r["status"] == "ok"}
    names = ("good 0.mp4", "good 1.mp4", "good 2.mp4", "good 3.mp4", "modern.mkv")
    assert good == {str(eight_clips / name) for name in names}
    for record in records:
        if record["status"] == "error":
            assert record["video"] in record["error"] and len(record["error"]) > len(record["video"]) + 10
        else:
            alone = captioner.caption(capkit.load_clip(record["video"]), decoding=FEW)
            assert record["text"] == alone.text
            assert store.strip_path(record).is_file()


def test_a_second_run_does_nothing_and_a_retry_only_errors(captioner, eight_clips, tmp_path, capsys):
    store, items = CaptionStore(tmp_path / "captions.jsonl"), find_clips(eight_clips)
    first = caption_clips(captioner, items, store, decoding=FEW)
    capsys.readouterr()
    assert caption_clips(captioner, items, store, decoding=FEW) == first
    assert "0 clips to caption, 8 done before" in capsys.readouterr().out
    caption_clips(captioner, items, store, decoding=FEW, retry_errors=True)
    assert len(store.lines()) == 8 + 3
    caption_clips(captioner, items, store, "Something else?", decoding=FEW)
    assert len(store.current()) == 16


def captioning_process(videos, store, pause_seconds):
    """Start a process that captions, with a pause after each record."""
    code = f"""
import capkit, time
from capkit.shards import caption_clips, find_clips
append = capkit.CaptionStore.append
def slowly(self, record):
    append(self, record)
    time.sleep({pause_seconds})
capkit.CaptionStore.append = slowly
captioner = capkit.load_captioner({str(GOLDEN)!r}, device="cpu")
store = capkit.CaptionStore({str(store)!r})
caption_clips(captioner, find_clips({str(videos)!r}), store, decoding=capkit.Decoding(max_new_tokens=6))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def kill_after(process, path, num_records):
    while not (path.exists() and path.read_bytes().count(b"\n") >= num_records):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_half_way_it_captions_only_what_was_missing(eight_clips, tmp_path):
    path = tmp_path / "captions.jsonl"
    kill_after(captioning_process(eight_clips, path, pause_seconds=0.5), path, num_records=3)
    before = CaptionStore(path).lines()
    assert 3 <= len(before) < 8
    again = captioning_process(eight_clips, path, pause_seconds=0)
    told, _ = again.communicate()
    assert again.returncode == 0
    assert f"{8 - len(before)} clips to caption, {len(before)} done before" in told
    lines = CaptionStore(path).lines()
    assert lines[: len(before)] == before and len(lines) == len({line["request"] for line in lines}) == 8
    assert sorted(line["status"] for line in lines) == ["error"] * 3 + ["ok"] * 5


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*torn")
def test_soak_killed_again_and_again_it_ends_with_a_record_a_clip(tmp_path):
    """400 clips, killed at random moments until it is done: nothing lost, nothing twice."""
    clips, path, random = tmp_path / "clips", tmp_path / "captions.jsonl", Random(0)
    clips.mkdir()
    for number in range(400):
        encode_clip(clips / f"{number}.mp4", [number] * 3, fps=10)
    kills = 0
    while (num_records := len(CaptionStore(path).current())) < 400:
        process = captioning_process(clips, path, pause_seconds=0)
        num_more = random.randint(10, 80)
        if num_records + num_more >= 400:
            process.communicate()
            assert process.returncode == 0
        else:
            kill_after(process, path, num_records + num_more)
            kills += 1
    lines = CaptionStore(path).lines()
    print(f"{kills} kills, {len(lines)} lines, {len({line['request'] for line in lines})} requests")
    assert kills >= 4 and len(lines) == len({line["request"] for line in lines}) == 400


def test_items_of_their_own_prompt_and_window(captioner, eight_clips, tmp_path):
    video = str(eight_clips / "good 3.mp4")
    items = [
        Item(video, "Why?", "because", 1.0, 3.0),
        Item(video),
        Item(video, " "),
        Item(video, "<|reserved_special_token_0|>?"),
        Item(video, start=9.0),
        Item(video, start=3.0, end=1.0),
        Item(video),
    ]
    store = CaptionStore(tmp_path / "captions.jsonl")
    records = caption_clips(captioner, items, store, decoding=FEW, batch_size=4)
    assert [r["status"] for r in records] == ["ok", "ok", "error", "error", "error", "error", "ok"]
    assert (records[0]["prompt"], records[0]["reference"]) == ("Why?", "because")
    assert records[0]["timestamps_seconds"][0] == 1.0 and records[0]["frame_indices"][0] == 10
    for record, word in zip(records[2:6], ("not empty", "marks", "between 9 s", "end_seconds"), strict=True):
        assert word in record["error"]
    assert records[6] == records[1] and len(store.lines()) == 6


def test_settings_that_fit_no_clip_stop_before_anything_starts(captioner, eight_clips, tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for settings in ({"template": "poem"}, {"prompt": ""}, {"frame_sampling": "all"}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            caption_clips(captioner, find_clips(eight_clips), store, **settings)
    assert not store.path.exists()


def test_a_clip_that_does_not_fit_into_memory_is_recorded(captioner, eight_clips, tmp_path, monkeypatch):
    generate = captioner.model.generate

    def cramped(*args, **kwargs):
        if len(kwargs["pixel_values_videos"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*args, **kwargs)

    monkeypatch.setattr(captioner.model, "generate", cramped)
    store = CaptionStore(tmp_path / "captions.jsonl")
    records = caption_clips(captioner, find_clips(f"{eight_clips}/good*"), store, decoding=FEW, batch_size=4)
    failed = [r for r in records if r["status"] == "error"]
    assert [len(r["frame_indices"]) for r in failed] == [5]
    assert "out of memory" in failed[0]["error"] and failed[0]["video"] in failed[0]["error"]


def test_progress_in_a_log_is_a_few_plain_lines(captioner, eight_clips, tmp_path, capsys):
    caption_clips(captioner, find_clips(eight_clips), CaptionStore(tmp_path / "c.jsonl"), decoding=FEW)
    told = capsys.readouterr()
    assert "\r" not in told.out + told.err
    assert "8/8 clips, 3 errors" in told.out and told.out.count("error: ") == 3
