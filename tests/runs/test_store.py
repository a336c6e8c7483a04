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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from paths import DATA
from PIL import Image
from store_records import an_error, make_record
from video_factory import encode_clip

import capkit
import capkit.__main__
from capkit import CaptionStore, Decoding, Prompt, plan_sweep, run_sweep
from capkit.export import export_dataset
from capkit.runs import Item, StoreBusy, caption_clips, caption_shard, find_clips, merge, new_record, request_settings
from capkit.runs.caption import plan_clips
from capkit.runs.digests import digest_once
from capkit.runs.store import ModelIdentity
from capkit.views import captions_page, compare_captions, show_caption, show_captions


@pytest.fixture
def store(tmp_path):
    return CaptionStore(tmp_path / "out" / "captions.jsonl")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not really a video")
    return path


def attempt(request, status="ok", **fields):
    record = {"request": request, "video": f"/clips/{request}.mp4", "status": status, "error": "broken"}
    return record | {"text": f"caption of {request}"} | fields


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


def test_a_torn_last_line_is_skipped_and_named_and_a_complete_one_is_a_record(store):
    """Cut the file at every byte of its last line, as a kill would; without its newline the line is complete."""
    store.append(attempt("a", text="Ein schöner Tag 🎈"))
    whole = store.path.read_bytes()
    store.append(attempt("b", text="naïve"))
    both = store.path.read_bytes()
    for cut in range(len(whole) + 1, len(both)):
        store.path.write_bytes(both[:cut])
        again = CaptionStore(store.path)
        is_torn = cut < len(both) - 1
        kept = ["a"] if is_torn else ["a", "b"]
        for more in ([], ["c"]):
            with pytest.warns(match=f"{store.path}, line 2 is skipped: torn") if is_torn else nullcontext():
                assert [r["request"] for r in again.current()] == kept + more
            again.append(attempt("c"))
        assert store.path.read_bytes().startswith(both[:cut] + b"\n")
        assert [path.name for path in store.path.parent.iterdir()] == ["captions.jsonl"]


def test_a_damaged_line_in_the_middle_is_skipped_and_named(store):
    for name in "abc":
        store.append(attempt(name))
    lines = store.path.read_bytes().split(b"\n")
    lines[1] = lines[1][:10] + b"\xff\xfe\x00"
    store.path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match="line 2 is skipped: torn or damaged, not in UTF-8"):
        assert [r["request"] for r in store.current()] == ["a", "c"]


def test_kill_9_at_any_moment_loses_nothing_that_was_appended(store):
    """The writer prints a number once its record is appended; after the kill every number printed is in the store."""
    code = f"""
import sys
from capkit.runs import CaptionStore
store = CaptionStore({str(store.path)!r})
for number in range(10**6):
    store.append({{"request": f"r{{number}}", "video": "a.mp4", "status": "ok", "text": "x" * 5000}})
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
        again.append(attempt("after"))
        with pytest.warns(UserWarning, match=f"line {kept} is skipped: torn"):
            assert len(again.current()) == kept


def test_a_file_name_that_is_not_utf_8(store):
    name = os.fsdecode(b"caf\xe9.mp4")
    store.append(attempt("a", video=name))
    assert [record["video"] for record in CaptionStore(store.path).current()] == [name]


@pytest.mark.parametrize("path", ["", ".", "/", Path()])
def test_a_path_without_a_name_is_refused(path):
    with pytest.raises(ValueError, match="names no file; give one, such as runs/captions.jsonl"):
        CaptionStore(path)


def test_a_path_in_place_of_a_store(tmp_path, captioner):
    path, clip = tmp_path / "c.jsonl", encode_clip(tmp_path / "good.mp4", range(10))
    (record,) = caption_clips(captioner, find_clips(clip), str(path), decoding={"max_new_tokens": 2})
    assert list(CaptionStore(path).current()) == [record]
    for shown in (show_captions(path, [record]), compare_captions([record], store=path), captions_page(str(path))):
        assert shown._repr_html_().count("data:image/webp;base64,") == 1


def test_records_that_cannot_be_kept(store):
    with pytest.raises(ValueError, match="needs its `request`"):
        store.append({"text": "x"})
    with pytest.raises(ValueError, match="mean_logprob is NaN: out of range"):
        store.append(attempt("a", mean_logprob=float("nan")))
    with pytest.raises(ValueError, match="less than 10,000,000 bytes"):
        store.append(attempt("a", own="x" * 10**7))
    with pytest.raises(ValueError, match="the text has more than 200,000 characters"):
        store.append(attempt("a", text="x" * 200_001))
    assert not store.path.exists()


def test_a_folder_stands_for_the_captions_in_it(tmp_path):
    (tmp_path / "captions.jsonl").touch()
    assert CaptionStore(tmp_path).path == CaptionStore(str(tmp_path)).path == tmp_path / "captions.jsonl"
    assert CaptionStore(tmp_path).strips == tmp_path / "captions_strips"


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
            {"prompt": Prompt("What?", answer_prefix="The")},
            {"own_text": "Who?"},
            {"decoding": capkit.Decoding(num_beams=2)},
            {"decoding": capkit.Decoding(forbidden_words=["a"])},
            {"decoding": capkit.Decoding(word_bias={"a": 1})},
            {"decoding": capkit.Decoding(word_bias={"a": 2})},
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


def test_steered_captions_are_kept_and_supersede_no_others(captioner, video, random_clip, store):
    prompt, words = Prompt("What?", answer_prefix="It is"), {"forbidden_words": ["a"], "word_bias": {"b": 1.5}}
    for one, decoding in ((prompt, {}), (prompt, words), ("What?", words), ("What?", {})):
        decoding = capkit.Decoding(max_new_tokens=3, **decoding)
        caption = captioner.caption(random_clip(), one, decoding)
        store.append(new_record(request_settings(captioner, video, one, decoding), caption))
    records = store.current()
    assert len(records) == 4
    assert [record.get("answer_prefix") for record in records] == ["It is", "It is", None, None]
    assert [record["text"].startswith("It is") for record in records] == [True, True, False, False]
    assert capkit.Decoding.of(records[1]["decoding"]) == capkit.Decoding(max_new_tokens=3, **words)
    assert Prompt.from_record(records[1]) == prompt


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
            [Item(video)],
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
        items = [Item(before[0]["video"]), Item(before[4]["video"])]
        assert caption_clips(model, items, old) == [before[0], before[4]]
        assert "0 clips to caption, 1 done before, 1 failed before" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["capkit", "show", str(old.path)])
        with pytest.raises(SystemExit, match="0"):
            capkit.__main__.main()
        assert "A striped wall." in capsys.readouterr().out

        assert "By hand." in show_caption(before[0]).html
        encode_clip(tmp_path / "clip.mp4", range(3))
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


def test_a_text_longer_than_readers_take_is_an_error(captioner, video, random_clip, store):
    caption = captioner.caption(random_clip(2), decoding=capkit.Decoding(max_new_tokens=3))
    record = new_record(request_settings(captioner, video, "What?"), replace(caption, text="a" * 200_001))
    store.append(record)
    assert store.current()[0]["error"].endswith("the model wrote 200,001 characters; it repeats itself")


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


def test_a_file_is_hashed_once_for_all_threads_and_again_once_it_changes(tmp_path, monkeypatch):
    path, hashed, fails = tmp_path / "clip.mp4", [], [MemoryError()]
    path.write_bytes(b"old")

    def slow(name):
        hashed.append(name)
        time.sleep(0.2)
        if fails:
            raise fails.pop()
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()

    monkeypatch.setattr("capkit.runs.digests.file_sha256", slow)
    digest = digest_once()
    with pytest.raises(MemoryError):
        digest(str(path))
    with ThreadPoolExecutor(4) as pool:
        assert {*pool.map(digest, [str(path)] * 8)} == {hashlib.sha256(b"old").hexdigest()} and len(hashed) == 2
        path.write_bytes(b"newer")
        assert {*pool.map(digest, [str(path)] * 8)} == {hashlib.sha256(b"newer").hexdigest()} and len(hashed) == 3
    assert digest(str(tmp_path / "gone.mp4")) is None


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


class TestStripsOfSomeoneElsesStore:
    @pytest.fixture
    def store(self, store):
        clip = capkit.Clip.from_frames(np.zeros((2, 56, 56, 3), np.uint8))
        store.save_strip({"strip": "good.webp"}, clip, image_size=56)
        return store

    def test_what_was_written_is_read(self, store):
        data = (store.strips / "good.webp").read_bytes()
        assert store.read_strip({"strip": "good.webp"}) == data
        clip = capkit.Clip.from_frames(np.random.default_rng(0).integers(0, 255, (400, 28, 28, 3), np.uint8))
        path = store.save_strip({"strip": "long-1_a.webp"}, clip, image_size=28)  # of noise, 34 rows of frames
        assert store.read_strip({"strip": "long-1_a.webp"}) == path.read_bytes()

    NAMES = ["", ".", "..", "good.png", "a/good.webp", "../captions_strips/good.webp", "..\\good.webp", "C:good.webp"]
    NAMES += ["/etc/passwd", "/etc/passwd\0.webp", "good.webp\n", "ghost:good.webp", "göod.webp"]

    @pytest.mark.parametrize("name", [None, 5, ["good.webp"], *NAMES])
    def test_only_plain_names(self, store, name):
        with pytest.raises(ValueError, match="is not the name of a picture strip"):
            store.read_strip({"strip": name})
        if name is None:
            with pytest.raises(ValueError, match="is not the name of a picture strip"):
                store.read_strip({})

    def test_only_regular_files_of_a_strips_size(self, store):
        def reason():
            with pytest.raises(ValueError) as error:
                store.read_strip({"strip": "x.webp"})
            path.unlink(missing_ok=True)
            return str(error.value)

        path = store.strips / "x.webp"
        assert "No such file" in reason()
        path.symlink_to(store.strips / "good.webp")
        assert "not a regular file" in reason()
        os.mkfifo(path)
        assert "not a regular file" in reason()
        with open(path, "wb") as file:
            file.truncate(10_000_000_000)
        assert "10000000000 bytes" in reason()
        path.symlink_to("/dev/zero")
        assert "not a regular file" in reason()

    def test_only_webp_pictures_as_capkit_writes_them(self, store):
        path, good = store.strips / "x.webp", (store.strips / "good.webp").read_bytes()

        def reason(content):
            path.write_bytes(content)
            with pytest.raises(ValueError) as error:
                store.read_strip({"strip": "x.webp"})
            return str(error.value)

        for format in ("png", "jpeg", "gif"):
            Image.new("RGB", (9, 9)).save(path, format)
            assert "not a WebP picture as capkit writes" in reason(path.read_bytes())
        Image.new("RGBA", (9, 9)).save(path, "webp", lossless=True)
        assert "not a WebP picture as capkit writes" in reason(path.read_bytes())
        for text in (b"", b"root:x:0:0:", b"<svg xmlns='http://www.w3.org/2000/svg'/>", good[:12], b" " + good):
            assert "not a WebP picture as capkit writes" in reason(text)
        bomb = good[:26] + b"\xff\x3f\xff\x3f" + good[30:]  # 16,383 x 16,383
        assert "16383 x 16383 pixels" in reason(bomb)
        assert "0 x 16383 pixels" in reason(good[:26] + b"\0\0\xff\x3f" + good[30:])


class TestTwoRunsOnOneStore:
    ITEMS = find_clips("demo", limit=2)
    FEW = Decoding(max_new_tokens=3)

    @pytest.mark.parametrize("kind", ["caption_clips", "run_sweep"])
    def test_the_second_is_refused_until_the_first_ends(self, captioner, store, kind):
        """While a run is between its captions, others are tried."""

        def run(kind, store):
            if kind == "run_sweep":
                return run_sweep(captioner, self.ITEMS, prompts=["a"], decodings=[self.FEW], store=store).records
            return caption_clips(captioner, self.ITEMS, store, prompt="a", decoding=self.FEW)

        class Probe(CaptionStore):
            num_refused = 0

            def append(self, record):
                link = self.path.with_name("link.jsonl")
                if self.path.exists() and not link.exists():
                    link.symlink_to(self.path)
                for path in filter(os.path.exists, (self.path, link)):
                    for kind in ("caption_clips", "run_sweep"):
                        with pytest.raises(StoreBusy, match="since .* is captioning into this store; wait for it, end"):
                            run(kind, CaptionStore(path))
                        self.num_refused += 1
                elsewhere = CaptionStore(self.path.with_name("elsewhere.jsonl"))
                assert len(run("caption_clips", elsewhere)) == 2
                super().append(record)
                CaptionStore(self.path).edit(record["request"], "by hand")  # goes in all the same

        probe = Probe(store.path)
        records = run(kind, probe)
        assert probe.num_refused >= 4 and [r["status"] for r in records] == ["ok", "ok"]
        assert run("caption_clips", store) and run("run_sweep", store)
        made = [line["request"] for line in store.lines() if "edits" not in line]
        assert len(made) == len(set(made)) and [r["edited_text"] for r in store.current()][:2] == ["by hand"] * 2
        assert not list(store.path.parent.glob(".*.capkit-lock"))

    def test_a_run_that_fails_frees_the_store(self, captioner, store):
        with pytest.raises(ValueError, match="batch_size"):
            caption_clips(captioner, self.ITEMS, store, batch_size=0)
        with store.hold():
            pass

    def test_merging_waits_for_no_run(self, captioner, tmp_path, monkeypatch, capsys):
        caption_shard(lambda: captioner, self.ITEMS[:1], tmp_path, decoding=self.FEW)
        merged = CaptionStore(tmp_path / "captions.jsonl")
        with merged.hold(), pytest.raises(StoreBusy, match="is captioning into this store"):
            merge(tmp_path)
        monkeypatch.setattr(sys, "argv", ["capkit", "merge", str(tmp_path)])
        with merged.hold(), pytest.raises(SystemExit) as ended:
            capkit.__main__.main()
        assert ended.value.code == 3 and "is captioning into this store" in capsys.readouterr().err
        assert merge(tmp_path).num_ok == 1

    def test_a_finished_store_that_cannot_be_written_still_gives_its_records(self, captioner, store, monkeypatch):
        made = caption_clips(captioner, self.ITEMS, store, decoding=self.FEW)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
        with CaptionStore(store.path.with_name("other.jsonl")).hold():
            assert caption_clips(captioner, self.ITEMS, store, decoding=self.FEW) == made
        assert not list(store.path.parent.glob(".*.capkit-lock"))

    def test_of_two_processes_at_once_one_is_refused_or_finds_all_done(self, store):
        code = (
            "import sys, capkit; from capkit.runs import StoreBusy\n"
            "captioner = capkit.load_captioner('demo', device='cpu'); print('ready', flush=True); input()\n"
            "clips, store = capkit.find_clips('demo', limit=4), capkit.CaptionStore(sys.argv[1])\n"
            "try: capkit.caption_clips(captioner, clips, store)\n"
            "except StoreBusy as error: print(error)"
        )
        both = [
            subprocess.Popen(
                [sys.executable, "-c", code, store.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        shown = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert sum("is captioning into this store" in text or "0 clips to caption" in text for text in shown) == 1
        assert len(store.lines()) == len({line["request"] for line in store.lines()}) == 4


def write_all(path, name):
    """Append 600 records as one of several writers."""
    store = CaptionStore(path)
    for number in range(600):
        store.append(attempt(f"{name} {number}", text=f"{name} {number} " * 400))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_two_writers_lose_nothing(store, kind):
    store.path.parent.mkdir()
    if kind == "threads":
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write_all, [store.path] * 2, "ab"))
    else:
        code = f"import sys; sys.path = {[str(Path(__file__).parent), *sys.path]}; "
        code += "from test_store import write_all; write_all(*sys.argv[1:])"
        writers = [subprocess.Popen([sys.executable, "-c", code, store.path, name]) for name in "ab"]
        assert [writer.wait() for writer in writers] == [0, 0]
    assert store.done() == {f"{name} {number}" for name in "ab" for number in range(600)}
    texts = {line["request"]: line["text"] for line in store.lines()}
    assert len(store.lines()) == 1200 and all(text == f"{request} " * 400 for request, text in texts.items())


def test_what_is_appended_elsewhere_or_changed_by_hand_is_seen(store):
    """The store reads only what was added, but all of a file that was changed, replaced or cut."""
    for name in "abc":
        store.append(attempt(name))
    before = store.current()
    CaptionStore(store.path).append(attempt("d"))
    assert [r["request"] for r in store.current()] == ["a", "b", "c", "d"] and len(before) == 3
    assert (
        before[-1]["request"] == "c" and before[:2] == [before[0], before[1]] and list(reversed(before))[0] == before[2]
    )
    with pytest.raises(IndexError):
        before[3]
    store.path.write_text(store.path.read_text().replace("caption of b", "mended by hand"))
    assert store.current()[1]["text"] == "mended by hand"
    store.path.write_text(store.path.read_text().replace("mended by hand", "MENDED BY HAND"))
    os.utime(store.path, ns=(1, 1))
    assert store.current()[1]["text"] == "MENDED BY HAND"
    os.truncate(store.path, store.path.read_bytes().index(b'{"request": "c"'))
    assert [r["request"] for r in store.current()] == ["a", "b"]
    other = store.path.with_name("other.jsonl")
    CaptionStore(other).append(attempt("z"))
    os.replace(other, store.path)
    assert [r["request"] for r in store.current()] == ["z"] and store.done() == {"z"}


class TestReplacedClips:
    def test_only_the_caption_of_the_new_file_is_shown(self, store, tmp_path):
        """A request of the same settings, but of another file: the older one is superseded, not forgotten."""
        old, new = make_record(1, tmp_path / "a.mp4"), make_record(2, tmp_path / "a.mp4", text="of the new file")
        others = [make_record(3, tmp_path / "b.mp4"), make_record(4, tmp_path / "a.mp4", prompt="Why?")]
        others += [make_record(5, tmp_path / "a.mp4", start_seconds=1.0), make_record(6, tmp_path / "a.mp4", sample=1)]
        for record in (old, *others, new):
            store.append(record)
        assert store.current() == [*others, new]
        assert store.done() == {record["request"] for record in (old, new, *others)}
        assert store.latest([old["request"], "none", new["request"]]) == [old, new]

    def test_an_error_supersedes_no_caption(self, store, tmp_path):
        old = make_record(1, tmp_path / "a.mp4")
        gone = an_error(make_record(2, tmp_path / "a.mp4"), "no such file")
        for records in ([old, gone], [gone, old]):
            store.path.unlink(missing_ok=True)
            store = CaptionStore(store.path)
            for record in records:
                store.append(record)
            assert store.current() == [old]
        store.append(make_record(3, tmp_path / "a.mp4", finish_reason="stopped"))
        assert store.current() == [old]

    @pytest.mark.parametrize("same_content", [True, False])
    def test_a_hand_edit_goes_over_to_a_copy_of_the_same_content(self, store, tmp_path, same_content):
        for number in (1, 2):
            sha256 = "same" if same_content else str(number)
            store.append(make_record(number, tmp_path / "a.mp4", video_sha256=sha256))
            if number == 1:
                store.edit(f"{1:020x}", "By hand.")
        (record,) = store.current()
        assert record["request"] == f"{2:020x}" and record.get("edited_text") == ("By hand." if same_content else None)
        store.edit(f"{2:020x}", "By hand, again.")
        assert store.current()[0]["edited_text"] == "By hand, again."

    def test_what_was_done_by_hand_last_counts_for_every_copy_of_the_same_content(self, store, tmp_path):
        def request(number):
            store.append(make_record(number, tmp_path / "a.mp4", video_sha256="same", text="A star."))
            return f"{number:020x}"

        def found(request):
            (current,), (latest,) = store.current(), store.latest([request])
            assert current == latest and current["request"] == request
            return current.get("edited_text"), current.get("mark")

        first = request(1)
        store.mark(first, "right")
        second = request(2)
        assert found(second) == (None, "right")
        store.edit(second, "By hand.")
        store.mark(second, "wrong")
        third = request(3)
        assert found(third) == ("By hand.", "wrong")
        audit = capkit.audit(store, 1)
        assert list(audit) == [] and audit.error_rate().num_wrong.item() == 1
        store.mark(third, None)
        assert found(third) == found(request(4)) == ("By hand.", None)

    def test_records_that_lack_a_setting_supersede_none(self, store):
        for name in "ab":
            store.append(attempt(name, video="/clips/same.mp4"))
        assert len(store.current()) == 2


class TestTakenAway:
    """A store that goes away while it is in use ends the run with an error that names it."""

    @pytest.fixture
    def used(self, store):
        for name in "abc":
            store.append(attempt(name))
        return store

    def take_away(self, store, how):
        if how == "file deleted":
            store.path.unlink()
        elif how.startswith("folder"):
            moved = store.path.parent.rename(store.path.parent.with_name("moved"))  # at once, while strips are written
            if how != "folder moved":
                shutil.rmtree(moved)
            if how == "folder made anew":
                store.path.parent.mkdir(exist_ok=True)
        else:
            store.path.write_text(json.dumps(attempt("other")) + "\n")

    HOW = ("file deleted", "folder deleted", "folder moved", "folder made anew", "shorter file")

    @pytest.mark.parametrize("how", HOW)
    @pytest.mark.parametrize("was_read", [True, False])
    def test_appending(self, used, how, was_read):
        store = CaptionStore(used.path) if was_read else used
        assert not was_read or len(store.current()) == 3
        self.take_away(store, how)
        with pytest.raises(OSError, match=f"{store.path}: was (deleted or moved|replaced by a shorter file) while it"):
            store.append(attempt("d"))
        store.append(attempt("d"))  # who was told so may go on
        assert [r["request"] for r in store.current()] == (["other"] if how == "shorter file" else []) + ["d"]

    @pytest.mark.parametrize("how", HOW)
    def test_reading(self, used, how):
        records = used.current()
        self.take_away(used, how)
        for read in (list, lambda records: records[2], lambda records: records == [1, 2, 3]):
            with pytest.raises(OSError, match=str(used.path)):
                read(records)
        assert len(used.current()) == (how == "shorter file") and len(used.done()) == (how == "shorter file")

    @pytest.mark.parametrize("how", HOW)
    def test_a_run(self, used, how, captioner, tmp_path):
        items = find_clips("demo", limit=3)

        class Lost(CaptionStore):
            num_appended = 0

            def append(store, record):
                super().append(record)
                store.num_appended += 1
                if store.num_appended == 2:
                    self.take_away(store, how)

        with pytest.raises(OSError, match=str(used.path)):
            caption_clips(captioner, items, Lost(used.path), decoding=Decoding(max_new_tokens=2))

    def test_a_strip(self, used, monkeypatch):
        real = os.replace

        def taken_away(part, path):
            shutil.rmtree(used.path.parent)
            real(part, path)

        monkeypatch.setattr(os, "replace", taken_away)
        clip = capkit.Clip.from_frames(np.zeros((1, 28, 28, 3), np.uint8))
        with pytest.raises(OSError, match=f"{used.path}: .*captions_strips was deleted or moved while it was in use"):
            used.save_strip({"strip": "x.webp"}, clip, image_size=28)
