"""Many clips into a store: bad ones among them, kills, retries, memory."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chance import seeded_random
from paths import GOLDEN
from PIL import Image
from store_records import an_error, make_record
from video_factory import cut, encode_clip

import capkit
import capkit.__main__
import capkit.runs.prefetch
import capkit.runs.shards
from capkit import CaptionStore, Decoding, Prompt, VideoError
from capkit.export import export_dataset
from capkit.files import file_sha256
from capkit.runs import (
    Shard,
    ShardBusy,
    caption_clips,
    caption_shard,
    find_clips,
    merge,
    read_ahead,
    to_frame,
    write_webvtt,
)
from capkit.runs.caption import plan_clips
from capkit.runs.clips import Item
from capkit.runs.prefetch import Quarantine
from capkit.runs.shards import write_plan
from capkit.sweep import run_sweep
from capkit.text import CapkitWarning
from capkit.video import ReaderHung, ReaderLost
from capkit.views import captions_page, show_captions

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
    return folder


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
    assert "0 clips to caption, 5 done before, 3 failed before" in capsys.readouterr().out
    caption_clips(captioner, items, store, decoding=FEW, retry_errors=True)
    assert len(store.lines()) == 8 + 3
    caption_clips(captioner, items, store, "Something else?", decoding=FEW)
    assert len(store.current()) == 16


def captioning_process(videos, store, pause_seconds):
    """Start a process that captions, with a pause after each record."""
    code = f"""
import capkit, time
from capkit.runs import caption_clips, find_clips
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
    printed, _ = again.communicate()
    assert again.returncode == 0
    num_errors = sum(line["status"] == "error" for line in before)
    told = f", {num_errors} failed before" if num_errors else "\n"
    assert f"{8 - len(before)} clips to caption, {len(before) - num_errors} done before{told}" in printed
    lines = CaptionStore(path).lines()
    assert lines[: len(before)] == before and len(lines) == len({line["request"] for line in lines}) == 8
    assert sorted(line["status"] for line in lines) == ["error"] * 3 + ["ok"] * 5


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*torn")
def test_soak_killed_again_and_again_it_ends_with_a_record_a_clip(tmp_path):
    """400 clips, killed at random moments until it is done: nothing lost, nothing twice."""
    clips, path, random = tmp_path / "clips", tmp_path / "captions.jsonl", seeded_random()
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


@pytest.mark.parametrize("decoding", [FEW, Decoding(max_new_tokens=6, temperature=1.0, seed=3)])
def test_clips_come_prepared_from_the_processes_that_read_them(captioner, eight_clips, tmp_path, monkeypatch, decoding):
    """Here nothing is preprocessed or drawn, and no file hashed twice; the records are those of full clips."""
    video = str(eight_clips / "good 3.mp4")
    items = [*find_clips(f"{eight_clips}/good*"), *(Item(video, start=i, end=i + 1) for i in range(1, 4))]
    full = [capkit.load_clip(item.video, "chat", item.start, item.end) for item in items]
    texts = [captioner.caption(clip, decoding=decoding).text for clip in full]
    hashed = []
    with monkeypatch.context() as patched:
        for name in ("video.clip.model_pixels", "runs.store.preprocess_frames", "runs.store.draw_strip"):
            patched.setattr(f"capkit.{name}", lambda *_, name=name: pytest.fail(f"{name} in this process"))
        patched.setattr("capkit.runs.digests.file_sha256", lambda path: hashed.append(path) or file_sha256(path))
        store = CaptionStore(tmp_path / "captions.jsonl")
        records = caption_clips(captioner, items, store, decoding=decoding, batch_size=2)
    assert [record["text"] for record in records] == texts and len(set(texts)) > 1
    assert sorted(hashed) == sorted({item.video for item in items})
    assert all(record["video_sha256"] == file_sha256(record["video"]) for record in records)
    other = CaptionStore(tmp_path / "other.jsonl")
    for record, clip in zip(records, full, strict=True):
        paths = store.strip_path(record), other.save_strip(record, clip, captioner.processor.image_size)
        strip, wanted = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in paths)
        assert strip.shape == wanted.shape and np.abs(strip - wanted).mean() < 0.5


def test_settings_that_fit_no_clip_stop_before_anything_starts(captioner, eight_clips, tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for settings in ({"prompt": {"template": "poem"}}, {"prompt": ""}, {"frame_sampling": "all"}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            caption_clips(captioner, find_clips(eight_clips), store, **settings)
    assert not store.path.exists()


def test_a_clip_that_does_not_fit_into_memory_is_recorded(new_captioner, eight_clips, tmp_path, monkeypatch):
    model = new_captioner.model.model
    encode = model.get_video_features

    def cramped(pixel_values_videos):
        if len(pixel_values_videos) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixel_values_videos)

    monkeypatch.setattr(model, "get_video_features", cramped)
    store = CaptionStore(tmp_path / "captions.jsonl")
    records = caption_clips(new_captioner, find_clips(f"{eight_clips}/good*"), store, decoding=FEW, batch_size=4)
    failed = [r for r in records if r["status"] == "error"]
    assert [len(r["frame_indices"]) for r in failed] == [5]
    assert "out of memory" in failed[0]["error"] and failed[0]["video"] in failed[0]["error"]
    assert "does not fit into memory; sample fewer frames" in failed[0]["error"]
    beams = Decoding(max_new_tokens=6, num_beams=2)
    (record,) = caption_clips(new_captioner, find_clips(failed[0]["video"]), store, decoding=beams)
    assert "does not fit into memory; lower num_beams=2" in record["error"]


@pytest.mark.parametrize("more", [{}, {"temperature": 0.8, "seed": 1}, {"num_beams": 2}])
def test_a_clip_whose_numbers_overflow_is_recorded(new_captioner, eight_clips, tmp_path, monkeypatch, more):
    """As in float16: the features of one clip's frames are not numbers, and so are its log probabilities."""
    model, good = new_captioner.model.model, find_clips(f"{eight_clips}/good [0-2]*")
    encode = model.get_video_features
    pixels = new_captioner.processor([capkit.load_clip(good[1].video)], capkit.Prompt())["pixel_values_videos"]

    def overflowing(pixel_values_videos):
        features = encode(pixel_values_videos).clone()
        of_frames = features.unflatten(0, (len(pixel_values_videos), -1))
        for number, frame in enumerate(pixel_values_videos):
            if any(torch.equal(frame, other) for other in pixels):
                of_frames[number] = torch.nan
        return features

    monkeypatch.setattr(model, "get_video_features", overflowing)
    store, decoding = CaptionStore(tmp_path / "captions.jsonl"), {"max_new_tokens": 3} | more
    records = caption_clips(new_captioner, good, store, decoding=decoding, batch_size=3)
    swept = run_sweep(new_captioner, good, tmp_path / "sweep.jsonl", decodings=[decoding]).records
    for each in (records, swept):
        assert [record["status"] for record in each] == ["ok", "error", "ok"]
        assert good[1].video in each[1]["error"] and "not finite; its numbers overflow in float32" in each[1]["error"]
    monkeypatch.undo()
    alone = [new_captioner.caption(capkit.load_clip(good[number].video), decoding=decoding).text for number in (0, 2)]
    assert [records[0]["text"], records[2]["text"]] == [swept[0]["text"], swept[2]["text"]] == alone


def test_a_clip_whose_file_fails_is_recorded_and_a_disk_that_fails_stops(captioner, eight_clips, tmp_path, monkeypatch):
    good, store = find_clips(f"{eight_clips}/good [0-2]*"), CaptionStore(tmp_path / "c.jsonl")
    load, errors = capkit.runs.prefetch.load_clip, [OSError(116, "Stale file handle", good[1].video)]

    def failing(video, *settings):
        if video == good[1].video:
            raise errors[-1]
        return load(video, *settings)

    monkeypatch.setattr(capkit.runs.prefetch, "load_clip", failing)
    records = caption_clips(captioner, good, store, decoding=FEW)
    assert [record["status"] for record in records] == ["ok", "error", "ok"] and "Stale" in records[1]["error"]
    errors.append(OSError(28, "No space left on device"))  # as for a worker's temporary files
    with pytest.raises(OSError, match="No space left"):
        caption_clips(captioner, good, store, decoding=FEW, retry_errors=True)
    assert store.current() == records


def test_a_clip_that_the_model_refuses_is_recorded(new_captioner, eight_clips, tmp_path, monkeypatch):
    good = find_clips(f"{eight_clips}/good [0-2]*")
    batch = new_captioner.caption_batch

    def refusing(clips, prompts, decoding):
        if any(clip.info.path == good[1].video for clip in clips):
            raise TypeError("a frame of the wrong kind")
        return batch(clips, prompts, decoding)

    monkeypatch.setattr(new_captioner, "caption_batch", refusing)
    records = caption_clips(new_captioner, good, CaptionStore(tmp_path / "c.jsonl"), decoding=FEW, batch_size=3)
    assert [record["status"] for record in records] == ["ok", "error", "ok"]
    assert records[1]["error"] == f"{good[1].video}: a frame of the wrong kind"


def test_progress_in_a_log_is_a_few_plain_lines(captioner, eight_clips, tmp_path, capsys):
    caption_clips(captioner, find_clips(eight_clips), CaptionStore(tmp_path / "c.jsonl"), decoding=FEW)
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err
    assert "8/8 clips, 3 errors" in printed.out and printed.out.count("error: ") == 3


class TestShard:
    def test_parts_are_disjoint_and_complete(self):
        items = list(range(23))
        parts = [Shard(index, 4).of(items) for index in range(4)]
        assert sorted(sum(parts, [])) == items and max(map(len, parts)) - min(map(len, parts)) <= 1
        halves = [Shard(3, 4).split(Shard(index, 2)).of(items) for index in range(2)]
        assert sorted(sum(halves, [])) == parts[3]
        assert (str(Shard.parse("2/8")), Shard.parse("2/8").name) == ("2/8", "shard-00002-of-00008")

    @pytest.mark.parametrize("text", ["8/8", "-1/8", "1/0", "1", "a/b", "1/2/3", ""])
    def test_nonsense_is_refused(self, text):
        with pytest.raises(ValueError, match="shard"):
            Shard.parse(text)

    @pytest.mark.parametrize(
        "environment, shard",
        [
            ({}, "0/1"),
            ({"RANK": "1", "WORLD_SIZE": "4"}, "1/4"),
            ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, "2/3"),
            ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, "0/1"),  # in the batch script itself, outside of srun
            ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "5"}, "4/5"),
            ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "3"}, "2/3"),
            (
                {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "3", "WORLD_SIZE": "4"},
                "7/8",
            ),
        ],
    )
    def test_from_slurm_and_torchrun(self, environment, shard):
        assert str(Shard.from_environment(environment)) == shard


def in_shards(captioner, items, folder, shard="0/1", **settings):
    return caption_shard(lambda: captioner, items, folder, shard, **{"decoding": FEW, "batch_size": 3} | settings)


class TestCaptionShard:
    def test_two_shards_are_merged_and_accounted_for(self, captioner, eight_clips, tmp_path):
        items = find_clips(eight_clips)
        records = in_shards(captioner, items + items[:1], tmp_path, "0/2")
        assert [record["video"] for record in records] == [item.video for item in items[::2]]
        half = merge(tmp_path)
        assert len(half.problems) == 1 and "shard 1/2 was never started" in half.problems[0]
        in_shards(captioner, items, tmp_path, "1/2")
        merged = merge(tmp_path)
        assert (merged.num_ok, merged.num_errors) == (5, 3) and "another list of clips" not in str(merged)
        lines = merged.store.lines()
        assert [line["video"] for line in lines] == [item.video for item in items]
        assert all(merged.store.strip_path(line).is_file() for line in lines if line["status"] == "ok")
        beat = json.loads((tmp_path / "shard-00001-of-00002.heartbeat.json").read_text())
        assert (beat["state"], beat["total"], beat["done"], beat["pid"]) == ("finished", 4, 4, os.getpid())

        merged.store.edit(lines[1]["request"], "By hand.")
        merged.store.append({"request": "of before", "video": "x", "status": "ok", "text": "kept"})
        again = merge(tmp_path)
        assert [line.get("edited_text") for line in again.store.current()].count("By hand.") == 1
        assert len(again.store.current()) == 9 and not again.problems

    def test_what_is_done_stays_done_with_another_number_of_shards(self, captioner, eight_clips, tmp_path, capsys):
        items = find_clips(f"{eight_clips}/good*")
        in_shards(captioner, items, tmp_path, "0/2")
        words = "holds shards of 2, this is one of 3: a run of its own, whose shards `merge` will all expect"
        with pytest.warns(CapkitWarning, match=words) as warned:
            for index in range(3):
                in_shards(captioner, items, tmp_path, f"{index}/3")
        assert len(warned) == 1  # the others have a shard of theirs beside them
        printed = re.findall(r"(\d+) clips? to caption", capsys.readouterr().out)
        assert sum(map(int, printed)) == len(items)
        merged = merge(tmp_path)
        assert merged.num_ok == len(items) == len(merged.store.lines()) and not merged.problems

    def test_merge_counts_what_the_store_held_before(self, captioner, eight_clips, tmp_path):
        caption_clips(captioner, find_clips(f"{eight_clips}/good*"), CaptionStore(tmp_path / "captions.jsonl"))
        in_shards(captioner, find_clips(f"{eight_clips}/good 0*"), tmp_path, "0/1", prompt="Why?")
        path = tmp_path / "captions.jsonl"
        for _ in range(2):
            told = f"1 caption and 0 errors in {path}, beside 4 records of other requests that it held before"
            assert str(merge(tmp_path)) == told and len(CaptionStore(path).current()) == 5

    def test_the_errors_of_rows_are_merged_last_until_they_are_mended(self, captioner, eight_clips, tmp_path):
        def run(*starts):
            rows = [{"video": str(eight_clips / "good 0.mp4"), "start": start} for start in starts]
            in_shards(captioner, find_clips(rows), tmp_path)
            records = merge(tmp_path).store.current()
            return [record["start_seconds"] if record["status"] == "ok" else "error" for record in records]

        assert run(0.5, "0:01", 1.5) == run(0.5, "0:01", 1.5) == [0.5, 1.5, "error"]
        assert run(0.5, 1.0, 1.5) == run(0.5, 1.0, 1.5) == [0.5, 1.0, 1.5]

    def test_shards_that_do_not_go_together_are_reported(self, captioner, eight_clips, tmp_path):
        items = find_clips(f"{eight_clips}/good*")
        in_shards(captioner, items, tmp_path, "0/3")
        in_shards(captioner, items[:3], tmp_path, "1/3")
        in_shards(captioner, items, tmp_path, "2/3", prompt={"text": "Why?", "template": "vqa"})
        problems = "\n".join(merge(tmp_path).problems)
        assert "another list of clips" in problems and "differ in template, prompt from" in problems
        in_shards(captioner, items, tmp_path, "2/3", prompt={"text": "Why?", "answer_prefix": "It is"})
        assert "differ in answer_prefix, prompt from" in "\n".join(merge(tmp_path).problems)
        for name in ("shard-00000-of-00003.jsonl", "captions.jsonl"):
            (tmp_path / name).unlink()
        assert f"no record of {items[0].video}" in str(merge(tmp_path))
        (tmp_path / "empty").mkdir()
        for name, reason in (
            ("nowhere", "no such folder"),
            ("captions.jsonl", "is a file"),
            ("empty", "holds no shards"),
        ):
            with pytest.raises(ValueError, match=f"{name}: {reason}"):
                merge(tmp_path / name)

    def test_a_file_name_that_is_not_utf_8_is_escaped_and_read_back(self, captioner, eight_clips, tmp_path, capfd):
        """In stores, pages, tables, subtitles and on the terminal."""
        clips, out = tmp_path / "clips", tmp_path / "out"
        clips.mkdir()
        names = [os.fsdecode(name) for name in (b"a.mp4", b"caf\xe9.mp4", b"cut\xe9.mp4", b"z.mp4")]
        try:
            for name in names:
                shutil.copy(eight_clips / ("short.mp4" if name[:3] == "cut" else "good 0.mp4"), clips / name)
        except OSError:
            pytest.skip("this file system has no such names")
        items = find_clips(clips)
        made = in_shards(captioner, items, out)
        store = CaptionStore(out / "captions.jsonl")
        store.append(made[1] | {"request": "another"})
        store.edit("another", "By hand.")
        for _ in range(2):
            assert "3 captions and 1 error in" in str(merge(out)) and not merge(out).problems
        records = [record for record in store.current() if record["request"] != "another"]
        assert [Path(record["video"]).name for record in records] == names
        assert [record["status"] for record in records] == ["ok", "ok", "error", "ok"]
        assert [Path(item.video).name for item in find_clips([record["video"] for record in records])] == names
        escaped, told = "caf\\udce9.mp4", "cut\\udce9.mp4"
        subprocess.run([sys.executable, "-m", "capkit", "show", str(store.path)], check=True)
        printed = capfd.readouterr().out
        assert escaped in printed and told in printed
        table = to_frame(records)
        assert escaped in table["video"][1] and told in table["error"][2] and table["text"][0] == records[0]["text"]
        assert told in show_captions(store, records).html and escaped in captions_page(store)._repr_html_()
        assert told in captions_page(store).save(tmp_path / "page.html").read_text(encoding="utf-8")
        assert names[1][:-4] in [path.stem for path in write_webvtt(records, tmp_path / "vtt")]
        swept = run_sweep(captioner, items, tmp_path / "sweep.jsonl", decodings=[FEW])
        assert [Path(video).name for video in swept.to_frame()["video"]] == ["a.mp4", escaped, told, "z.mp4"]
        assert set(map(os.path.basename, swept.to_frame()["clip"])) == {"a.mp4", told}  # the others are copies
        report = export_dataset(out / "captions.jsonl", "diffusers", tmp_path / "export")
        in_file = [clip["video"] for clip in json.loads(report.path.read_text("utf-8"))["clips"]]
        assert any(escaped in video for video in in_file) and in_file == list(report.table["video"])

    def test_a_shard_started_twice_is_refused_and_a_dead_ones_lock_is_not(self, captioner, eight_clips, tmp_path):
        items = find_clips(f"{eight_clips}/good 0.mp4")
        code = "import filelock, sys; x = filelock.FileLock(sys.argv[1]); x.acquire(); print('held', flush=1); input()"
        lock = tmp_path / ".shard-00000-of-00001.jsonl.capkit-lock"
        holder = subprocess.Popen(
            [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ShardBusy, match="is at work on this shard"):
                in_shards(captioner, items, tmp_path)
            assert not list(tmp_path.glob("*.jsonl"))
        finally:
            holder.kill()
            holder.communicate()
        assert in_shards(captioner, items, tmp_path)[0]["status"] == "ok"

    def test_a_disk_that_fills_up(self, captioner, eight_clips, tmp_path):
        """The system itself cuts the writing short, at a size that files may not pass."""
        resource = pytest.importorskip("resource")
        items, path = find_clips(f"{eight_clips}/good*"), tmp_path / "shard-00000-of-00001.jsonl"
        in_shards(captioner, items[:1], tmp_path)
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        try:
            with pytest.raises(OSError) as error:
                in_shards(captioner, items, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(tmp_path) in str(error.value) and path.read_bytes().startswith(before)
        torn = pytest.warns(match=f"{path}, line 2 is skipped: torn")  # what fitted of the line
        with torn:
            assert [record["status"] for record in in_shards(captioner, items, tmp_path)] == ["ok"] * 4
        with torn:
            assert not merge(tmp_path).problems


class TestWhichRunCounts:
    """Plans and stores as shards on several hosts write them; the clocks of hosts differ."""

    @pytest.fixture
    def start(self, tmp_path, monkeypatch):
        """start(index, count, clock, prompt): a shard of 8 clips, started when its host's clock says so."""
        videos = [tmp_path / f"{number}.mp4" for number in range(8)]

        def start(index, count, clock, prompt="Why?", statuses="ok", **fields):
            monkeypatch.setattr(capkit.runs.shards, "now", lambda: f"2026-11-26T{clock}+00:00")
            numbers = [number + 100 * len(prompt) for number in range(8)]
            planned = [make_record(n, video, prompt=prompt) for n, video in zip(numbers, videos, strict=True)]
            own = Shard(index, count).of(planned)
            write_plan(tmp_path, Shard(index, count), [Item(str(v)) for v in videos], own, Prompt(prompt))
            store = CaptionStore(tmp_path / f"{Shard(index, count).name}.jsonl")
            for record in own:
                store.append(record | fields if statuses == "ok" else an_error(record) | fields)

        return start

    @pytest.mark.parametrize("clocks", [("12:00:00", "12:00:00"), ("12:00:00", "11:00:00"), ("12:00:00", "13:00:00")])
    def test_the_run_started_last(self, start, tmp_path, clocks):
        """Of 4 shards the run that asks something else, of 8; in equal seconds and with clocks an hour apart."""
        first, second = clocks
        for index in range(4):
            start(index, 4, first)
        for index in range(8):
            start(index, 8, second, "What moves?")
        merged = merge(tmp_path)
        assert merged.num_ok == 8 and not merged.problems
        assert {record["prompt"] for record in merged.store.current()} == {"What moves?"}
        start(3, 4, "14:00:00")  # killed and started again: still of its run
        assert {r["prompt"] for r in merge(tmp_path).store.current()} >= {"What moves?"} and not merge(
            tmp_path
        ).problems
        start(0, 3, "10:00:00", "Who?")
        problems = merge(tmp_path).problems
        assert [p.split(";")[0] for p in problems] == ["shard 1/3 was never started", "shard 2/3 was never started"]
        assert "delete shard-*-of-00003.plan.json" in problems[0]
        for path in tmp_path.glob("shard-*-of-00003.plan.json"):
            path.unlink()
        assert not merge(tmp_path).problems

    def test_a_run_that_differs_in_its_clips(self, start, tmp_path, monkeypatch):
        start(0, 1, "12:00:00")
        before = [path.read_bytes() for path in sorted(tmp_path.glob("*.plan.json"))]
        start(0, 1, "12:00:00")
        assert [path.read_bytes() for path in sorted(tmp_path.glob("*.plan.json"))] == before
        record = make_record(7, tmp_path / "7.mp4")
        write_plan(tmp_path, Shard(0, 2), [Item("7.mp4")], [record], Prompt("Why?"))
        write_plan(tmp_path, Shard(1, 2), [Item("7.mp4")], [], Prompt("Why?"))  # has no clips, joins all the same
        runs = {path.name: json.loads(path.read_text())["run"] for path in tmp_path.glob("*.plan.json")}
        assert runs == {
            "shard-00000-of-00001.plan.json": 1,
            "shard-00000-of-00002.plan.json": 2,
            "shard-00001-of-00002.plan.json": 2,
        }

    def test_captions_go_before_errors_then_the_last_of_a_file_and_of_files_the_latest(self, start, tmp_path):
        early, late = {"created": "2026-11-26T11:00:00+00:00"}, {"created": "2026-11-26T12:00:00+00:00"}
        start(0, 2, "12:00:00", text="ok", **early)
        start(0, 3, "12:00:00", statuses="error", **late)
        assert {r["text"] for r in merge(tmp_path).store.current()} >= {"ok"}
        start(0, 1, "12:00:00", text="first, by a fast clock", **late)
        start(0, 1, "12:00:00", text="second in the file", created="2026-11-26T11:30:00+00:00")
        merged = merge(tmp_path)
        texts = [record["text"] for record in merged.store.current()]
        assert merged.num_ok == 8 and set(texts) == {"second in the file"}
        start(0, 4, "12:00:00", text="in another file, later", **late)
        texts = [record["text"] for record in merge(tmp_path).store.latest([f"{n + 400:020x}" for n in range(8)])]
        assert texts[0] == texts[4] == "in another file, later" and texts[1] == "second in the file"

    def test_a_replaced_clip_is_shown_once(self, start, tmp_path):
        start(0, 1, "12:00:00")
        merge(tmp_path)
        new = [make_record(900 + n, tmp_path / f"{n}.mp4", prompt="Why?", text="new") for n in range(8)]
        write_plan(tmp_path, Shard(), [Item(record["video"]) for record in new], new, Prompt("Why?"))
        for record in new:
            CaptionStore(tmp_path / f"{Shard().name}.jsonl").append(record)
        merged = merge(tmp_path)
        assert [record["text"] for record in merged.store.current()] == ["new"] * 8 and merged.num_ok == 8

    def test_damaged_lines_of_the_merged_store_are_put_aside(self, start, tmp_path):
        start(0, 1, "12:00:00")
        path = merge(tmp_path).store.path
        before = path.read_bytes()
        path.write_bytes(before + b'{"request": "written by hand, to be mended')
        with (
            pytest.warns(match="line 9 is skipped"),
            pytest.warns(match="no longer in it, but in .*captions.jsonl.damaged"),
        ):
            merge(tmp_path)
        path.write_bytes(before + b"another\n")
        with pytest.warns(match="line 9 is skipped"), pytest.warns(match=r"but in .*captions\.jsonl\.damaged\.2"):
            merge(tmp_path)
        aside = [(tmp_path / name).read_text() for name in ("captions.jsonl.damaged", "captions.jsonl.damaged.2")]
        assert path.read_bytes() == before
        assert aside == ['{"request": "written by hand, to be mended\n', "another\n"]

    def test_what_was_captioned_or_edited_since_a_merge_is_shown_with_it(self, start, tmp_path, monkeypatch, capsys):
        def shown():
            monkeypatch.setattr(sys, "argv", ["capkit", "show", str(tmp_path)])
            with pytest.raises(SystemExit, match="0"):
                capkit.__main__.main()
            first, _, later = capsys.readouterr().out.partition("captions.jsonl lacks these; `python -m capkit merge")
            return re.findall(r"(\d)\.mp4", first), re.findall(r"(\d)\.mp4\n  (.*)", later)

        start(0, 2, "12:00:00", text="first")
        start(1, 2, "12:00:00", statuses="error")
        merged = merge(tmp_path).store
        assert shown() == ([*"01234567"], [])
        store = CaptionStore(tmp_path / f"{Shard(1, 2).name}.jsonl")
        retried = [record["request"] for record in store.current()][1]
        store.append(make_record(0, tmp_path / "3.mp4", request=retried, text="second"))
        store.append(make_record(999, tmp_path / "9.mp4", text="new"))
        first = CaptionStore(tmp_path / f"{Shard(0, 2).name}.jsonl")
        first.edit(first.current()[0]["request"], "by hand")
        merged.edit(first.current()[1]["request"], "edited after the merge: nothing that it lacks")
        assert shown()[1] == [("0", "by hand"), ("3", "second"), ("9", "new")]
        assert merge(tmp_path).num_ok == 5 and shown()[1] == [("9", "new")]  # which no plan asks for


class TestReading:
    @pytest.fixture
    def reading(self, monkeypatch):
        """Set `reading.fault` to an error for the clips named in `reading.bad`; `reading.read` names what was read."""
        reading = SimpleNamespace(bad=(), fault=None, read=[])

        def load_clip(path, *arguments):
            reading.read.append(Path(path).name)
            if Path(path).name in reading.bad and reading.fault is not None:
                raise reading.fault(path, "as was to be shown")
            return capkit.load_clip(path, *arguments)

        monkeypatch.setattr(capkit.runs.prefetch, "load_clip", load_clip)
        return reading

    def test_a_clip_that_hangs_goes_to_quarantine(self, captioner, eight_clips, tmp_path, reading):
        items = find_clips(f"{eight_clips}/good [01]*")
        reading.bad, reading.fault = ("good 0.mp4",), ReaderHung
        for expected in (["good 0.mp4", "good 1.mp4"], []):
            records = in_shards(captioner, items, tmp_path / "out", retry_errors=True)
            assert [record["status"] for record in records] == ["error", "ok"]
            assert sorted(reading.read) == expected
            reading.read.clear()
        assert "as was to be shown; not read again, because it is in" in records[0]["error"]
        in_shards(captioner, items, tmp_path / "out", prompt="Something else?")
        assert reading.read == ["good 1.mp4"]
        reading.fault = None
        records = in_shards(captioner, items, tmp_path / "out", retry_quarantined=True)
        assert [record["status"] for record in records] == ["ok", "ok"] and reading.read[1:] == ["good 0.mp4"]
        assert merge(tmp_path / "out").num_ok == 2

    def test_a_clip_in_quarantine_is_read_again_once_replaced(self, eight_clips, tmp_path):
        video = shutil.copy(eight_clips / "good 0.mp4", tmp_path)
        quarantine = Quarantine(tmp_path / "q.jsonl")
        quarantine.add(video, "hung")
        with pytest.raises(VideoError, match="hung; not read again"):
            Quarantine(tmp_path / "q.jsonl").check(video)
        shutil.copy(eight_clips / "good 1.mp4", video)
        assert Quarantine(tmp_path / "q.jsonl").check(video) is None

    def test_a_reader_that_died_has_a_second_try(self, captioner, eight_clips, tmp_path, reading):
        reading.bad, reading.fault = ("good 0.mp4",), ReaderLost
        (record,) = in_shards(captioner, find_clips(eight_clips / "good 0.mp4"), tmp_path)
        assert record["status"] == "error" and reading.read == ["good 0.mp4"] * 2
        assert len((tmp_path / "shard-00000-of-00001.quarantine.jsonl").read_text().splitlines()) == 1

    def test_batches_are_of_like_length(self, captioner, eight_clips, tmp_path, monkeypatch):
        batches, caption_batch = [], captioner.caption_batch

        def noting(clips, *arguments):
            batches.append(sorted(map(len, clips)))
            return caption_batch(clips, *arguments)

        monkeypatch.setattr(captioner, "caption_batch", noting)
        video = str(eight_clips / "good 3.mp4")
        items = [Item(video, start=0.1 * i, end=0.1 * i + (1, 3)[i % 2]) for i in range(8)]
        records = caption_clips(captioner, items, CaptionStore(tmp_path / "c.jsonl"), decoding=FEW, batch_size=4)
        assert len(batches) == 2 and batches[0][-1] < batches[1][0]
        assert [record["start_seconds"] for record in records] == [item.start for item in items]

    def test_clips_that_wait_take_no_more_memory_than_they_may(self, captioner, eight_clips, reading):
        planned = plan_clips(captioner, find_clips([eight_clips / "good 0.mp4"] * 12))
        num_bytes = capkit.load_clip(eight_clips / "good 0.mp4", timeout_seconds=None).frames.nbytes
        with closing(read_ahead(planned, None, 8, 2, memory_bytes=3 * num_bytes)) as pairs:
            for number, _ in enumerate(pairs, 1):
                deadline = time.monotonic() + 60
                while len(reading.read) < min(number + 3, 12):  # three that wait fill the memory
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                assert len(reading.read) <= number + 3 + 2  # two were being read
        assert number == 12 == len(reading.read)


class TestCommandLine:
    def run(self, monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["capkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            capkit.__main__.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    def test_wrong_arguments_and_a_folder_that_cannot_be_written(self, monkeypatch, capsys, eight_clips, tmp_path):
        (tmp_path / "file").touch()
        few = ("--decoding", '{"max_new_tokens": 6}', "--device", "cpu")
        for code, word, arguments in (
            (2, "shard 5/4", (eight_clips, "--output", tmp_path, "--shard", "5/4")),
            (2, "no videos found", (tmp_path / "*.mp4", "--output", tmp_path / "o")),
            (2, "unknown frame sampling", (eight_clips, "--output", tmp_path / "o", "--frame-sampling", "all")),
            (2, "window_seconds=-1", (eight_clips, "--output", tmp_path / "o", "--window-seconds", "-1")),
            (2, "unknown trainer", (eight_clips, "--output", tmp_path / "o", "--trainer", "sora")),
            (2, "top_q", (eight_clips, "--output", tmp_path / "o", "--decoding", '{"top_q": 1}')),
            (2, "no/model", (eight_clips, "--output", tmp_path / "o", "--model", "no/model/here")),
            (2, str(tmp_path / "file"), (eight_clips, "--output", tmp_path / "file" / "o", *few)),
        ):
            ended, printed = self.run(monkeypatch, capsys, "caption-shard", *arguments)
            assert ended == code and word in printed and "Traceback" not in printed, printed
        assert self.run(monkeypatch, capsys, "merge", tmp_path / "nowhere")[0] == 2

    def test_one_process_for_each_device(self, monkeypatch, capsys, eight_clips, tmp_path):
        clips = tmp_path / "clips"
        shutil.copytree(eight_clips, clips)
        (clips / "notes.txt").touch()
        arguments = ["caption-shard", clips, "--output", tmp_path, "--devices", "cpu,cpu"]
        arguments += ["--decoding", '{"max_new_tokens": 6}', "--model", GOLDEN]
        run = subprocess.run([sys.executable, "-m", "capkit", *arguments], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert f"capkit: {clips}: left out 1 not named like videos (.txt 1)" in run.stderr.splitlines()
        assert "shard 0/2: 4 clips" in run.stdout and "shard 1/2: 4 clips" in run.stdout
        code, printed = self.run(monkeypatch, capsys, "merge", tmp_path)
        assert code == 0 and "5 captions and 3 errors" in printed
        for name in ("shard-00001-of-00002.jsonl", "captions.jsonl"):
            (tmp_path / name).unlink()
        code, printed = self.run(monkeypatch, capsys, "merge", tmp_path)
        assert code == 1 and printed.count("no record of") == 4
