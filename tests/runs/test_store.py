"""The caption store: what is on disk after a kill, what is current, what is done, edits, strips."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from paths import DATA
from PIL import Image

import capkit
import capkit.__main__
from capkit import CaptionStore, Decoding, Prompt, plan_sweep
from capkit.export import export_dataset
from capkit.runs import caption_clips, find_clips, new_record, request_settings
from capkit.runs.caption import plan_clips
from capkit.runs.store import ModelIdentity
from capkit.views import show_caption


@pytest.fixture
def store(tmp_path):
    return CaptionStore(tmp_path / "out" / "captions.jsonl")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not really a video")
    return path


def attempt(request, status="ok", **fields):
    return {"request": request, "status": status, "text": f"caption of {request}"} | fields


def test_latest_attempt_counts_in_the_order_of_first_attempts(store):
    for record in (attempt("a"), attempt("b", "error"), attempt("c"), attempt("a", text="again"), attempt("b")):
        store.append(record)
    assert [(r["request"], r["text"]) for r in store.current()] == [
        ("a", "again"),
        ("b", "caption of b"),
        ("c", "caption of c"),
    ]
    assert len(store.lines()) == 5


def test_errors_are_retried_only_on_request(store):
    store.append(attempt("a"))
    store.append(attempt("b", "error"))
    assert store.done() == {"a", "b"}
    assert store.done(retry_errors=True) == {"a"}


def test_a_caption_stopped_by_hand_is_no_answer_and_replaces_none(store):
    stopped = {"finish_reason": "stopped", "text": "half a"}
    for record in (attempt("a", finish_reason="eos"), attempt("a", **stopped), attempt("b", **stopped)):
        store.append(record)
    assert [record["text"] for record in store.current()] == ["caption of a", "half a"]
    assert store.done() == {"a"}
    store.append(attempt("b", finish_reason="length"))
    assert store.current()[1]["text"] == "caption of b" and store.done() == {"a", "b"}


def test_an_empty_store_and_one_that_does_not_exist(store):
    assert store.current() == [] and store.done() == set()
    assert not store.path.parent.exists()
    store.path.parent.mkdir()
    store.path.touch()
    store.append(attempt("a"))
    assert len(store.current()) == 1


def test_edits_refer_to_a_request_and_survive_reruns(store):
    store.append(attempt("a"))
    store.edit("a", "by hand")
    store.append(attempt("a", text="from a rerun"))
    (record,) = store.current()
    assert (record["text"], record["edited_text"]) == ("from a rerun", "by hand")
    store.edit("a", "by hand, better")
    assert store.current()[0]["edited_text"] == "by hand, better"
    with pytest.raises(ValueError, match="has no request 'z' to edit"):
        store.edit("z", "text")


def test_any_torn_last_line_is_set_aside_and_reported(store):
    """Cut the file at every byte of its last line, as a kill would."""
    store.append(attempt("a", text="Ein schöner Tag 🎈"))
    whole = store.path.read_bytes()
    store.append(attempt("b", text="naïve"))
    both = store.path.read_bytes()
    for cut in range(len(whole) + 1, len(both)):
        store.path.write_bytes(both[:cut])
        torn = store.path.with_name("captions.jsonl.torn")
        torn.unlink(missing_ok=True)
        again = CaptionStore(store.path)
        if cut < len(both) - 1:
            with pytest.warns(UserWarning, match="line 2 is not valid JSON"):
                assert [r["request"] for r in again.current()] == ["a"]
        with pytest.warns(UserWarning, match="the last line was torn"):
            again.append(attempt("c"))
        assert [r["request"] for r in again.current()] == ["a", "c"]
        assert torn.read_bytes() == both[len(whole) : cut] + b"\n"


def test_a_damaged_line_in_the_middle_is_skipped_and_named(store):
    for name in "abc":
        store.append(attempt(name))
    lines = store.path.read_bytes().split(b"\n")
    lines[1] = lines[1][:10] + b"\xff\xfe\x00"
    store.path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match="line 2 is not valid JSON; skipped"):
        assert [r["request"] for r in store.current()] == ["a", "c"]


def test_kill_9_at_any_moment_loses_nothing_that_was_appended(store):
    """The writer prints a number once its record is appended; after the kill every number printed is in the store."""
    code = f"""
import sys
from capkit.runs import CaptionStore
store = CaptionStore({str(store.path)!r})
for number in range(10**6):
    store.append({{"request": f"r{{number}}", "status": "ok", "text": "x" * 5000}})
    print(number, flush=True)
"""
    for wait in (0.0, 0.05, 0.2):
        store.path.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        printed = [0] + [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.wait()
        again = CaptionStore(store.path)
        kept = len(again.path.read_bytes().splitlines())
        assert kept >= printed[-1] + 1
        os.truncate(again.path, os.path.getsize(again.path) - 7)
        with pytest.warns(UserWarning, match="torn"):
            again.append(attempt("after"))
        assert len(again.current()) == kept


def test_a_file_name_that_is_not_utf_8(store):
    name = os.fsdecode(b"caf\xe9.mp4")
    store.append({"request": "a", "video": name, "status": "ok"})
    assert [record["video"] for record in CaptionStore(store.path).current()] == [name]


def test_records_that_cannot_be_kept(store):
    with pytest.raises(ValueError, match="needs its `request`"):
        store.append({"text": "x"})
    with pytest.raises(ValueError):
        store.append(attempt("a", mean_logprob=float("nan")))
    assert not store.path.exists()


class TestRequests:
    def test_every_setting_makes_another_request(self, captioner, video, tmp_path):
        other = tmp_path / "other.mp4"
        other.write_bytes(video.read_bytes())
        base = {"captioner": captioner, "video": video, "prompt": "What?"}
        changes = [
            {},
            {"video": other},
            {"prompt": "Why?"},
            {"prompt": Prompt("What?", "vqa")},
            {"prompt": Prompt("What?", history=[("q", "a")])},
            {"prompt": Prompt("What?", frame_numbers="seconds")},
            {"own_text": "Who?"},
            {"decoding": capkit.Decoding(num_beams=2)},
            {"frame_sampling": "base"},
            {"frame_sampling": capkit.FrameSampling("chat", 12)},
            {"start_seconds": 1.0},
            {"end_seconds": 2.0},
            {"sample": 1},
            {"video": tmp_path / "missing.mp4"},
        ]
        requests = [request_settings(**(base | change))["request"] for change in changes]
        assert len(set(requests)) == len(changes)

    def test_equal_settings_make_equal_requests(self, captioner, video, monkeypatch):
        pasted = capkit.Decoding.from_generate_kwargs(do_sample=False, temperature=0.1)
        first = request_settings(captioner, video, "What?", decoding=pasted)
        monkeypatch.chdir(video.parent)
        second = request_settings(captioner, video.name, "What?", frame_sampling=capkit.FrameSampling("chat", 24))
        assert first == second

    def test_a_changed_file_or_model_is_another_request(self, captioner, video, monkeypatch):
        before = request_settings(captioner, video, "What?")["request"]
        os.utime(video, (1, 1))
        after = request_settings(captioner, video, "What?")["request"]
        monkeypatch.setattr(captioner, "fingerprint", "retrained")
        assert len({before, after, request_settings(captioner, video, "What?")["request"]}) == 3


class TestStoresWrittenBefore:
    """captions_before_rooms.jsonl was written by capkit as of commit 5062731, for videos that are not there."""

    @pytest.fixture
    def old(self, tmp_path):
        return CaptionStore(shutil.copy(DATA / "captions_before_rooms.jsonl", tmp_path / "captions.jsonl"))

    def test_the_same_settings_are_the_same_requests(self, old):
        default, window, seconds, repeat, missing = old.current()
        model = ModelIdentity("demo", default["model_fingerprint"], "float32", None)
        video = default["video"]
        items = [{"video": video}, {"video": video, "prompt": "Why?", "reference": "A star.", "start": 1, "end": 3}]
        planned = plan_clips(model, find_clips([*items, {"video": missing["video"]}]))
        planned += plan_clips(
            model,
            find_clips(video),
            Prompt("What moves?", history=[("Is it day?", "Yes.")], frame_numbers="seconds"),
            Decoding(max_new_tokens=6, temperature=0.8, seed=3),
            {"strategy": "uniform", "num_frames": 3},
        )
        sweep = plan_sweep(
            video,
            prompts=["objects"],
            decodings=[{"max_new_tokens": 8, "temperature": 0.5}],
            frame_samplings=[{"strategy": "fps", "num_frames": 8, "frames_per_second": 2}],
            templates=["vqa"],
            num_samples=2,
        )
        (_, _, _), (source, cell, sample) = sweep.requests()
        noun = (cell.prompt, Decoding.of(repeat["decoding"]), cell.frame_sampling)  # repeats had consecutive seeds
        planned.append(request_settings(model, source.video, *noun, source.start, source.end, sample))
        for record, settings in zip((default, window, missing, seconds, repeat), planned, strict=True):
            assert settings == {name: record[name] for name in settings}
            assert list(settings) == [name for name in record if name in settings]

    def test_the_digest_of_a_file_is_as_it_was(self, captioner, video):
        """The formula of commit 5062731, written out: sorted JSON of the frames, the file and the settings."""
        os.utime(video, ns=(10**18, 10**18))
        sampling = {"strategy": "chat", "num_frames": 24, "frames_per_second": None}
        frames = {"video": str(video), "frame_sampling": sampling, "start_seconds": 0.0, "end_seconds": None}
        settings = {"template": "chat", "frame_numbers": "index", "prompt": "Why?", "history": [["q", "a"]]}
        settings |= {"decoding": {"max_new_tokens": 2048}, "sample": 0, "quantization": None}
        settings |= {"model_fingerprint": captioner.fingerprint, "dtype": "float32"}
        content = json.dumps([frames, [len("not really a video"), 10**18], settings], sort_keys=True)
        expected = hashlib.sha256(content.encode()).hexdigest()[:20]
        prompt = Prompt("Why?", history=[("q", "a")])
        assert request_settings(captioner, video, prompt)["request"] == expected

    def test_they_resume_show_and_export(self, old, capsys, monkeypatch, tmp_path):
        before = old.current()
        assert [record["status"] for record in before] == ["ok"] * 4 + ["error"]
        assert before[0]["edited_text"] == "By hand." and len(old.done()) == 5
        model = SimpleNamespace(name="demo", fingerprint=before[0]["model_fingerprint"], dtype="float32")
        model.quantization, model.processor = None, SimpleNamespace(image_size=224)
        items = find_clips([before[0]["video"], before[4]["video"]])
        assert caption_clips(model, items, old) == [before[0], before[4]]
        assert "0 clips to caption, 2 done before" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["capkit", "show", str(old.path)])
        with pytest.raises(SystemExit, match="0"):
            capkit.__main__.main()
        assert "A striped wall." in capsys.readouterr().out

        assert "By hand." in show_caption(before[0]).html
        (tmp_path / "clip.mp4").write_bytes(b"exported as it is")
        text = old.path.read_text().replace("/nowhere/clip.mp4", str(tmp_path / "clip.mp4"))
        old.path.write_text(text)
        report = export_dataset(old, "cogvideo", tmp_path / "data", choose=["edited"])
        assert report.table.loc[report.table["status"] == "exported", "text"].tolist() == ["By hand."]

    def test_new_records_have_the_same_fields(self, old, captioner, random_clip):
        clip = random_clip()
        caption = captioner.caption(clip, "Why?", {"max_new_tokens": 2})
        record = new_record(request_settings(captioner, "a.mp4", "Why?"), caption, clip)
        before = [name for name in old.current()[0] if name != "edited_text"]
        assert [name for name in record if name != "video_notes"] == before


def test_a_record_has_the_designs_fields(captioner, video, random_clip, store):
    clip = random_clip(2)
    clip = replace(clip, info=replace(clip.info, hdr="PQ", interlaced=True))
    settings = request_settings(captioner, video, "What?")
    caption = captioner.caption(clip, "What?", decoding=capkit.Decoding(max_new_tokens=3))
    good, bad = new_record(settings, caption, clip), new_record(settings, capkit.VideoError(video, "is not a video"))
    fields = """request video video_sha256 frame_sampling frame_indices timestamps_seconds start_seconds end_seconds
        video_notes template frame_numbers prompt history decoding sample model model_fingerprint dtype quantization
        text num_tokens mean_logprob finish_reason seconds status error capkit_version created""".split()
    for record in (good, bad):
        assert set(fields) <= set(record)
        store.append(record)
    assert (good["status"], good["num_tokens"], good["frame_indices"]) == ("ok", 3, [0, 1])
    assert [note.split(":")[0] for note in good["video_notes"]] == ["HDR (PQ)", "interlaced"]
    assert good["video_sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    assert bad["status"] == "error" and str(video) in bad["error"] and "is not a video" in bad["error"]
    assert json.loads(store.path.read_text().splitlines()[0]) == good


def test_strip_shows_the_frames_that_the_model_saw(store):
    """A wide red clip with green sides: the model sees the middle, so the strip has no green."""
    frames = np.zeros((14, 30, 90, 3), np.uint8)
    frames[..., 1] = 255
    frames[:, :, 28:62] = (255, 0, 0)
    path = store.save_strip({"strip": "x.webp"}, capkit.Clip.from_frames(frames), image_size=56)
    assert path == store.strip_path({"strip": "x.webp"}) and path.stat().st_size < 30_000
    strip = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert strip.shape == (2 * 114 - 2, 12 * 114 - 2, 3)
    for index in range(14):  # a little inside each frame's edge, where colours bleed
        top, left = index // 12 * 114 + 8, index % 12 * 114 + 8
        assert (abs(strip[top : top + 96, left : left + 96] - (255, 0, 0)) < 40).all()
    assert (strip[114 + 8 :, 2 * 114 + 8 :] > 235).all()  # 14 frames: two in the second row, the rest is empty


def test_clips_of_the_same_frames_may_save_their_strip_at_the_same_time(store):
    """As captions of one video under several prompts do, which are read by several threads."""
    clip, together = capkit.Clip.from_frames(np.zeros((1, 56, 56, 3), np.uint8)), Barrier(4)

    def save(name):
        together.wait(timeout=60)
        return store.save_strip({"strip": name}, clip, image_size=56)

    with ThreadPoolExecutor(4) as pool:
        for number in range(50):
            paths = [*pool.map(save, [f"{number}.webp"] * 4)]
            assert set(paths) == {store.strips / f"{number}.webp"}
    assert len([*store.strips.iterdir()]) == 50  # and nothing half written
