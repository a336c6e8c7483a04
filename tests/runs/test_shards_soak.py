"""Captioning at scale under load and under attack: each campaign prints what it counted."""

import collections
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from chance import seeded_random
from paths import GOLDEN
from video_factory import damage, encode_clip

import capkit
from capkit.runs import caption_shard, find_clips, merge

pytestmark = pytest.mark.soak
NUM_CLIPS, NUM_KILLS = int(os.environ.get("CAPKIT_SOAK_CLIPS", 2000)), int(os.environ.get("CAPKIT_SOAK_KILLS", 20))
FEW = {"max_new_tokens": 6}
HEARTBEAT = "shard-00000-of-00001.heartbeat.json"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Clips of 1 to 4 seconds."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(NUM_CLIPS):
        encode_clip(folder / f"{number:05}.mp4", range(number % 1000, number % 1000 + 10 * (1 + number % 4)), fps=10)
    return folder


def start(videos, output, *more, model=GOLDEN, decoding=FEW):
    command = [sys.executable, "-m", "capkit", "caption-shard", videos, "--output", output, "--model", model]
    command += ["--decoding", json.dumps(decoding), "--device", "cpu", *more]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def beat(output):
    try:
        return json.loads((output / HEARTBEAT).read_text())
    except FileNotFoundError:
        return {"done": 0}


def check_all_accounted_for(output, num_clips):
    """Every clip has one current record; returns how often each status came, over all attempts."""
    merged = merge(output)
    lines = merged.store.lines()
    assert not merged.problems
    assert len(lines) == len({line["request"] for line in lines}) == num_clips == merged.num_ok + merged.num_errors
    return {"ok": merged.num_ok, "errors": merged.num_errors}


def test_throughput_memory_and_rate(many, tmp_path):
    decoding, captioner = capkit.Decoding(max_new_tokens=32), capkit.load_captioner("demo", device="cpu")
    clips = sorted(many.iterdir())[:100]
    before = time.monotonic()
    for path in clips:
        captioner.caption(capkit.load_clip(path), decoding=decoding)
    loop = len(clips) / (time.monotonic() - before)

    process = start(many, tmp_path, model="demo", decoding={"max_new_tokens": 32})
    seen, began = [], None
    while process.poll() is None:
        time.sleep(0.2)
        now = beat(tmp_path)
        began = began or ("pid" in now and time.monotonic())
        ours = psutil.Process(process.pid)
        memory = sum(each.memory_info().rss for each in [ours, *ours.children()] if each.is_running())
        seen.append((now["done"], memory, time.monotonic()))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    rate = NUM_CLIPS / (time.monotonic() - began)
    shown = beat(tmp_path)["per_minute"] / 60
    early = max(memory for done, memory, _ in seen if done <= 200)
    late = max(memory for done, memory, _ in seen if done > NUM_CLIPS // 2)
    print(f"\n{NUM_CLIPS} clips: {rate:.1f} a second, a plain loop {loop:.1f}: {rate / loop:.2f} times as fast")
    print(f"rate shown {shown:.1f} a second, {shown / rate - 1:+.1%}")
    print(f"memory at most {early / 2**20:.0f} MiB until clip 200, {late / 2**20:.0f} MiB in the second half")
    assert late < 1.15 * early
    print(check_all_accounted_for(tmp_path, NUM_CLIPS))


def test_killed_at_random_moments(many, tmp_path):
    chance, kills = seeded_random(), 0
    while kills < NUM_KILLS:
        process = start(many, tmp_path)
        shown = beat(tmp_path).get("updated")
        while process.poll() is None and beat(tmp_path).get("updated") == shown:
            time.sleep(0.05)  # until it is at work
        time.sleep(chance.random() * 3)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    last = start(many, tmp_path)
    printed, _ = last.communicate()
    assert last.returncode == 0, printed
    lines = capkit.CaptionStore(tmp_path / "shard-00000-of-00001.jsonl").lines()
    print(f"\n{kills} kills: {len(lines)} lines for {NUM_CLIPS} clips;", check_all_accounted_for(tmp_path, NUM_CLIPS))
    assert len(lines) == NUM_CLIPS


def test_reading_processes_killed(many, tmp_path):
    chance, kills, process = seeded_random(), 0, start(many, tmp_path)
    while process.poll() is None:
        time.sleep(chance.random() / 2)
        try:
            children = psutil.Process(process.pid).children()
        except psutil.NoSuchProcess:
            break
        if children and kills < NUM_KILLS:
            children[0].kill()
            kills += 1
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    counts = check_all_accounted_for(tmp_path, NUM_CLIPS)
    print(f"\n{kills} reading processes killed:", counts)
    assert kills and counts["errors"] <= kills // 2  # a clip is given up when its second process is killed too


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts")
def test_full_disk_and_read_only_output(many, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={192 + NUM_CLIPS // 4}k"  # the plan, which names all clips, and some records
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        process = start(many, disk)
        printed, _ = process.communicate()
        num_lines = len(capkit.CaptionStore(disk / "shard-00000-of-00001.jsonl").lines())
        print(f"\nfull disk: exit code {process.returncode} after {num_lines} records: {printed.splitlines()[-2]}")
        assert process.returncode == 1 and "No space left on device" in printed and "Traceback" not in printed
        assert 0 < num_lines < NUM_CLIPS
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        process = start(many, disk)
        printed, _ = process.communicate()
        print(f"read-only: exit code {process.returncode}: {printed.splitlines()[-2]}")
        assert process.returncode == 1 and "Read-only file system" in printed and "Traceback" not in printed
        subprocess.run(["mount", "-o", "remount,rw,size=1g", disk], check=True)
        process = start(many, disk)
        printed, _ = process.communicate()
        assert process.returncode == 0 and f"{num_lines} done before" in printed
        print("with room again:", check_all_accounted_for(disk, NUM_CLIPS))
    finally:
        subprocess.run(["umount", disk])


def test_the_same_manifest_started_twice_at_once(many, tmp_path):
    processes = [start(many, tmp_path) for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    codes = sorted(process.returncode for process in processes)
    lines = capkit.CaptionStore(tmp_path / "shard-00000-of-00001.jsonl").lines()
    print(
        f"\nexit codes {codes}, {len(lines)} lines for {NUM_CLIPS} clips;", check_all_accounted_for(tmp_path, NUM_CLIPS)
    )
    assert codes == [0, 3] and "is at work on this shard" in "".join(printed) and len(lines) == NUM_CLIPS


def test_clips_that_hang_crash_or_need_too_much_memory(tmp_path, captioner, monkeypatch):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("good", "hangs", "crashes"):
        encode_clip(clips / f"{name}.mp4", range(20), fps=10)
    encode_clip(clips / "wide.mp4", range(24), size=(2160, 3840), fps=1)
    os.mkfifo(clips / "fifo.mp4")
    (tmp_path / "decord").mkdir()
    (tmp_path / "decord" / "__init__.py").write_text(
        "import av, ctypes, numpy, os\n__version__ = '0.6.0'\nclass DECORDError(Exception): pass\n"
        "class VideoReader:\n"
        "    def __init__(self, path):\n"
        "        if 'hangs' in path: ctypes.PyDLL(None).pause()\n"
        "        if 'crashes' in path: os.abort()\n"
        "        self.frames = [f.to_ndarray(format='rgb24') for f in av.open(path).decode(video=0)]\n"
        "    def __len__(self): return len(self.frames)\n"
        "    def get_frame_timestamp(self, indices): return numpy.array([[i / 10, 0] for i in indices])\n"
        "    def get_batch(self, indices): return numpy.stack([self.frames[i] for i in indices])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    by_decord = {"strategy": "chat", "decoder": "decord"}
    settings = {
        "frame_sampling": by_decord,
        "timeout_seconds": 20,
        "memory_bytes": 2**29,
        "decoding": capkit.Decoding(**FEW),
    }
    with pytest.warns(UserWarning, match="left out 1 unreadable .*fifo.mp4"):
        items = find_clips(clips)
    records = caption_shard(lambda: captioner, items, tmp_path / "out", **settings)
    print()
    for record in records:
        print(Path(record["video"]).name, record["status"], record["error"])
    assert {Path(r["video"]).name for r in records if r["status"] == "ok"} == {"good.mp4"}
    quarantine = (tmp_path / "out" / "shard-00000-of-00001.quarantine.jsonl").read_text()
    assert quarantine.count("\n") == 2 and "hangs.mp4" in quarantine and "crashes.mp4" in quarantine
    before = time.monotonic()
    caption_shard(lambda: captioner, items, tmp_path / "out", retry_errors=True, **settings)
    print(f"retried in {time.monotonic() - before:.1f} s, without those two")
    print(check_all_accounted_for(tmp_path / "out", 4))


def test_500_damaged_copies(tmp_path):
    chance, clips = seeded_random(), tmp_path / "clips"
    clips.mkdir()
    kinds = {"h264.mp4": "libx264", "mpeg4.avi": "mpeg4", "vp9.webm": "libvpx-vp9", "h264.mkv": "libx264"}
    sources = {name: encode_clip(tmp_path / name, range(30), fps=10, codec=codec) for name, codec in kinds.items()}
    for number in range(500):
        name, path = chance.choice(sorted(sources.items()))
        (clips / f"{number:03} {name}").write_bytes(damage(path.read_bytes(), chance))
    shutil.copy(sources["h264.mp4"], clips / "good.mp4")
    process = start(clips, tmp_path / "out", "--timeout-seconds", 20)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    counts = check_all_accounted_for(tmp_path / "out", 501)
    errors = [r["error"] for r in capkit.CaptionStore(tmp_path / "out" / "captions.jsonl").current() if r["error"]]
    reasons = collections.Counter(error.split(": ", 1)[1].split(":")[0].split("(")[0].strip() for error in errors)
    print("\n500 damaged copies:", counts, json.dumps(reasons.most_common(12), indent=1))
    assert all(str(clips) in error for error in errors)
    assert not any("took more than" in error for error in errors)
