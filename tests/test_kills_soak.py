"""Whatever writes files is killed at random moments, or finds no room: files are whole, and the next run completes.

Shards are in `runs/test_shards_soak.py`, too. CAPKIT_SOAK_KILLS sets the number of kills, CAPKIT_SEED the moments.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from chance import seeded_random
from paths import GOLDEN, NOTEBOOKS
from store_records import make_record
from video_factory import encode_clip

import capkit
from capkit.export import ExportError, export_dataset
from capkit.export.layouts import LAYOUTS
from capkit.files import atomic_write, file_sha256
from capkit.runs import Item, Shard, caption_shard, find_clips, merge
from capkit.runs.caption import plan_clips
from capkit.runs.shards import write_plan
from capkit.runs.store import ModelIdentity

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process"),
    pytest.mark.filterwarnings("ignore:.*(torn|use of fork|not valid JSON)"),
]
NUM_KILLS = int(os.environ.get("CAPKIT_SOAK_KILLS", 20))
FEW = {"max_new_tokens": 6}


def killed(action, after_seconds):
    """Do something in a forked process and kill it so many seconds after its beginning; False if it was done before."""
    process = os.fork()
    if not process:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(after_seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed"
    return os.WIFSIGNALED(status)


def seconds_of(action):
    began = time.monotonic()
    action()
    return time.monotonic() - began


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A file system of so many kilobytes; skips where nothing can be mounted."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(options).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


# ---- merge ---------------------------------------------------------------------------------------------------------


def write_shards(folder, generation, num_clips=400, num_shards=3):
    """Stores of shards in which each clip has a caption of this generation beside those of earlier ones."""
    model = ModelIdentity("m", "f", "float32", None)
    items = [Item(f"/clips/{number}.mp4") for number in range(num_clips)]
    for index in range(num_shards):
        shard = Shard(index, num_shards)
        planned = plan_clips(model, shard.of(items))
        if not generation:
            write_plan(folder, shard, items, planned, capkit.Prompt())
        with open(folder / f"{shard.name}.jsonl", "a") as file:
            for settings in planned:
                made = {"status": "ok", "text": f"{generation} {'word ' * 100}", "created": f"{2000 + generation}"}
                file.write(json.dumps(settings | made) + "\n")


def merged_generation(folder, num_clips=400):
    """The generation of all captions in the merged store; each clip has one, and each hand edit is there once."""
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    edits, records = [line for line in lines if "edits" in line], [line for line in lines if "request" in line]
    assert len(edits) == len({line["edits"] for line in edits}) == 5 and len(lines) == num_clips + 5
    assert len({record["request"] for record in records}) == num_clips
    (generation,) = {int(record["text"].split()[0]) for record in records}
    return generation


def test_merge_killed(tmp_path):
    random, kept = seeded_random(), 0
    write_shards(tmp_path, 0)
    store = merge(tmp_path).store
    for record in store.current()[:5]:
        store.edit(record["request"], "by hand")
    seconds = seconds_of(lambda: merge(tmp_path))
    for generation in range(1, NUM_KILLS + 1):
        write_shards(tmp_path, generation)
        killed(lambda: merge(tmp_path), random.uniform(0, 1.5 * seconds))
        found = merged_generation(tmp_path)
        assert found in (generation - 1, generation)
        kept += found < generation
        seconds = seconds_of(lambda: merge(tmp_path))
        assert merged_generation(tmp_path) == generation
    print(f"{NUM_KILLS} kills of merge: {kept} times the file was the old one, {NUM_KILLS - kept} times the new one")


# ---- what is done by hand --------------------------------------------------------------------------------------------


def write_captions(path, num_captions):
    lines = (make_record(number, path.with_name(f"{number}.mp4"), text="A red dot.") for number in range(num_captions))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return capkit.CaptionStore(path)


def test_marking_killed(tmp_path):
    """What was marked is there once, however often the process is killed; each next one goes on."""
    random, journal = seeded_random(), tmp_path / "journal"
    store, num_kills = write_captions(tmp_path / "captions.jsonl", 100 * NUM_KILLS), 0

    def mark_all():
        with open(journal, "a", buffering=1) as file:
            for record in capkit.CaptionStore(store.path).current():
                if "mark" not in record:
                    capkit.CaptionStore(store.path).mark(record, "wrong", "red", record["request"])
                    file.write(record["request"] + "\n")

    for _ in range(NUM_KILLS):
        num_kills += killed(mark_all, random.uniform(0.05, 1.0))
        done = set(journal.read_text().split()) if journal.exists() else set()
        marked = {record["request"] for record in store.current() if record.get("mark") == "wrong"}
        assert done <= marked and len(marked) <= len(done) + num_kills
    mark_all()
    records, made = store.current(), [line["marks"] for line in store.lines() if "marks" in line]
    assert len(made) == len(set(made)) == len(records) == 100 * NUM_KILLS
    assert all(record["mark"] == "wrong" and record["remark"] == record["request"] for record in records)
    print(f"{num_kills} kills while {len(made)} captions were marked: each has its one mark")


def test_replacing_and_taking_back_killed(tmp_path):
    """After a kill all captions are replaced or none; the next run replaces once, and a batch goes back as a whole."""
    random = seeded_random()
    seconds = seconds_of(lambda: capkit.replace(write_captions(tmp_path / "0.jsonl", 3000), "red", "red red").write())
    num_before = num_after = 0
    for number in range(1, NUM_KILLS + 1):
        store = write_captions(tmp_path / f"{number}.jsonl", 3000)

        def replace(path=store.path):
            capkit.replace(path, "red", "red red").write()

        killed(replace, random.uniform(0, 1.1 * seconds))
        (text,) = {record.get("edited_text", record["text"]) for record in store.current()}
        num_before, num_after = num_before + (text == "A red dot."), num_after + (text == "A red red dot.")
        if text == "A red dot.":
            replace()
        assert {record["edited_text"] for record in store.current()} == {"A red red dot."}
        (batch,) = [line["completes"] for line in store.lines() if "completes" in line]
        killed(lambda path=store.path, batch=batch: capkit.undo(path, batch), random.uniform(0, 0.2 * seconds))
        (text,) = {record.get("edited_text", record["text"]) for record in store.current()}
        if text == "A red red dot.":
            capkit.undo(store, batch)
        assert not any("edited_text" in record for record in store.current()) and len(store.current()) == 3000
    assert num_before + num_after == NUM_KILLS
    print(f"{NUM_KILLS} kills of a replacement: {num_before} times nothing was replaced, {num_after} times all")


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.mp4").write_bytes(bytes(200_000) + bytes([number]))
    return folder


def caption_store(path, clips, generation):
    settings = plan_clips(ModelIdentity("m", "f", "float32", None), find_clips(clips))
    done = {"status": "ok", "text": f"Words {generation}.", "created": "2026"}
    made = [one | done | {"video_sha256": file_sha256(one["video"])} for one in settings]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in made))
    return path


def test_export_killed(tmp_path, clips):
    random, root, layout = seeded_random(), tmp_path / "out" / "data", LAYOUTS["cogvideo"]
    outcomes = {"old": 0, "new": 0, "aside": 0}

    def export(store):
        return export_dataset(store, "cogvideo", root, clips="copy", overwrite=True)

    def generations(folder):
        pairs = list(layout.read(folder))
        assert len(pairs) == 30 and all(clip.read_bytes() == (clips / clip.name).read_bytes() for clip, _ in pairs)
        return {text for _, text in pairs}

    stores = [caption_store(tmp_path / f"{number}.jsonl", clips, number) for number in (0, 1)]
    export(stores[0])
    seconds = seconds_of(lambda: export(stores[1]))
    for kill in range(NUM_KILLS):
        new = kill % 2
        export(stores[1 - new])
        killed(lambda new=new: export(stores[new]), random.uniform(0, 1.5 * seconds))
        if root.exists():
            (found,) = generations(root)
            outcomes["new" if found == f"Words {new}." else "old"] += 1
        else:  # between two renames: the old folder is whole, under the name that it was moved to
            (aside,) = root.parent.glob(".data.old-*/data")
            assert generations(aside) == {f"Words {1 - new}."}
            outcomes["aside"] += 1
        export(stores[new])
        assert generations(root) == {f"Words {new}."}
        assert not [path.name for path in root.parent.iterdir() if path.name.startswith(".")]
    print(f"{NUM_KILLS} kills of export: {outcomes}")


# ---- captioning ---------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(8):
        encode_clip(folder / f"{number}.mp4", range(number, number + 10), fps=10)
    return folder


def kill_forks(action, path, num_records, longest_seconds):
    """Kill it again and again: what a store has is kept, and what it has not comes; prints how often it was killed."""
    random, kills, before = seeded_random(), 0, []
    for _ in range(NUM_KILLS):
        kills += killed(action, random.uniform(0, longest_seconds))
        lines = capkit.CaptionStore(path).lines()
        assert lines[: len(before)] == before and len(lines) == len({line["request"] for line in lines})
        before = lines
    action()
    check_whole(path, num_records)
    print(f"{kills} kills: {len(before)} of {num_records} captions came before the last run; none is missing or double")
    assert before, "killed before any caption came: give it longer"


def test_sweep_killed(tmp_path, captioner, random_clip):
    clips = [random_clip(seed=seed) for seed in range(300)]
    decodings = [FEW, FEW | {"temperature": 1.0}]
    plan = capkit.plan_sweep(clips, ["Why?", "Who?"], decodings, num_samples=3)
    path = tmp_path / "sweep.jsonl"
    kill_forks(lambda: capkit.run_sweep(captioner, plan, path), path, plan.num_captions, longest_seconds=2.5)


def test_chain_killed(tmp_path, captioner, random_clip):
    """Between two steps too: a caption comes with all its answers, or not at all."""
    prompts = [["Who?", "Where?", "Why?"], ["Who?", "Where?", "When?"], "Why?"]
    plan = capkit.plan_sweep([random_clip(seed=seed) for seed in range(150)], prompts, [FEW])
    path = tmp_path / "chains.jsonl"
    kill_forks(lambda: capkit.run_sweep(captioner, plan, path), path, plan.num_captions, longest_seconds=2.5)
    for line in capkit.CaptionStore(path).lines():
        assert len(line.get("steps", [])) == len(line.get("step_answers", []))


def test_shard_killed(tmp_path, captioner):
    (tmp_path / "clips").mkdir()
    for number in range(300):
        encode_clip(tmp_path / "clips" / f"{number}.mp4", range(number, number + 10), fps=10)
    items, path = find_clips(tmp_path / "clips"), tmp_path / "out" / "shard-00000-of-00001.jsonl"
    shard = partial(caption_shard, lambda: captioner, items, tmp_path / "out", decoding=FEW)
    kill_forks(shard, path, 300, longest_seconds=6.0)
    assert merge(tmp_path / "out").problems == [] and num_lines(tmp_path / "out" / "captions.jsonl") == 300


def kill_again_and_again(start, lines_so_far, victims, random):
    """Start, wait until it writes, kill some of its processes, wait until all have ended by themselves; and again.

    Args:
        start: starts a process.
        lines_so_far: number of lines that it has written.
        victims: from that process and all below it, those to kill.

    Returns:
        The number of kills, fewer than NUM_KILLS if all was done before.
    """
    for kills in range(NUM_KILLS):
        process, wanted = start(), lines_so_far() + random.randint(1, 4)
        while process.poll() is None and lines_so_far() < wanted:
            time.sleep(0.01)
        time.sleep(random.random() / 5)
        if process.poll() is not None:
            return kills
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for victim in victims(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait(120)
        _, alive = psutil.wait_procs(family[1:], timeout=120)
        assert not alive, f"{alive} outlive the process that started them"
    return NUM_KILLS


def num_lines(*paths):
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def check_whole(path, num_records):
    """Each request has one line, and all were captioned."""
    lines = capkit.CaptionStore(path).lines()
    assert len(lines) == len({line["request"] for line in lines}) == num_records
    assert all(line["status"] == "ok" for line in lines)


def is_kernel(process):
    return "ipykernel_launcher" in " ".join(process.cmdline())


def notebook_command(tmp_path, videos, name, **parameters):
    """Starts papermill on a notebook."""
    parameters |= {"videos": str(videos), "model": str(GOLDEN), "output_dir": str(tmp_path / "results")}
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    (source,) = NOTEBOOKS.glob(f"{name}_*.ipynb")
    command = ["-m", "papermill", source, tmp_path / "out.ipynb", "-f", tmp_path / "parameters.json", "-k", "python3"]
    log = open(tmp_path / "log.txt", "ab")
    return lambda: subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log, cwd=tmp_path)


@pytest.mark.parametrize("who", ["papermill", "kernel"])
def test_notebook_killed(tmp_path, videos, who):
    random, path = seeded_random(), tmp_path / "results" / "captions.jsonl"
    axes = {"prompts": [f"Question {number}?" for number in range(40)], "decodings": [{"max_new_tokens": 30}]}
    start = notebook_command(tmp_path, videos, "03", **axes, measure="num_words")

    def victims(family):
        return [one for one in family if is_kernel(one)] if who == "kernel" else family[:1]

    kills = kill_again_and_again(start, lambda: num_lines(path), victims, random)
    process = start()
    assert process.wait() == 0, (tmp_path / "log.txt").read_text()[-2000:]
    check_whole(path, 8 * 40)
    print(f"{kills} kills of the {who} of notebook 03: {num_lines(path)} lines for {8 * 40} captions")


def test_batch_killed(tmp_path, videos):
    random, (notebook,) = seeded_random(), NOTEBOOKS.glob("01_*.ipynb")
    parameters = {"videos": str(videos), "model": str(GOLDEN), "decoding": FEW, "batch_size": 1}
    runs = [{"name": f"run-{number}", "parameters": {"prompt": f"Question {number}?"}} for number in range(3)]
    table = {"notebook": str(notebook), "parameters": parameters, "runs": runs, "workers": 2}
    (tmp_path / "runs.yaml").write_text(json.dumps(table))
    log = open(tmp_path / "log.txt", "ab")

    def start(*more):
        command = [sys.executable, "-m", "capkit", "batch", tmp_path / "runs.yaml", *more]
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)

    paths = [tmp_path / "runs" / f"run-{number}" / "results" / "captions.jsonl" for number in range(3)]

    def victims(family):  # the batch, one of its runs or one of their kernels; then the batch in any case
        return [random.choice(family), family[0]]

    kills = kill_again_and_again(start, lambda: num_lines(*paths), victims, random)
    start().wait()  # what was interrupted
    assert start("--retry").wait() == 0, (tmp_path / "log.txt").read_text()[-2000:]  # what failed
    for path in paths:
        check_whole(path, 8)
    statuses = [json.loads((path.parents[1] / "status.json").read_text())["status"] for path in paths]
    print(f"{kills} kills of a batch, its runs and kernels: {statuses}, {num_lines(*paths)} lines for 24 captions")
    assert statuses == ["done"] * 3


# ---- no room, no permission ----------------------------------------------------------------------------------------


def test_full_and_read_only_disk(tmp_path, clips, captioner):
    """Merge, export and sweep name the file that had no room; what was there stays whole; with room they complete."""
    with small_disk(tmp_path / "disk", 2000) as disk:
        write_shards(disk, 0)
        merge(disk)
        for record in capkit.CaptionStore(disk / "captions.jsonl").current()[:5]:
            capkit.CaptionStore(disk / "captions.jsonl").edit(record["request"], "by hand")
        merge(disk)
        write_shards(disk, 1)
        old = caption_store(tmp_path / "old.jsonl", clips, 0)
        prompts = [f"Question {number}?" for number in range(200)]
        sweep = {"store": disk / "sweep.jsonl", "prompts": prompts, "decodings": [{"max_new_tokens": 1}]}
        clip = next(capkit.runs.DEMO_CLIPS.glob("*.mp4"))

        def fails(reason):
            said = []
            with pytest.raises(OSError, match=rf"{reason}.*captions\.jsonl") as error:
                merge(disk)
            said.append(str(error.value))
            assert merged_generation(disk) == 0
            with pytest.raises(ExportError, match=reason) as error:
                export_dataset(old, "cogvideo", disk / "data", clips="copy")
            said.append(str(error.value))
            assert not (disk / "data").exists()
            with pytest.raises(OSError, match=rf"{reason}.*sweep") as error:
                capkit.run_sweep(captioner, str(clip), **sweep)
            said.append(str(error.value))
            print(f"{reason}:", *said, sep="\n  ")

        room = os.statvfs(disk)
        (disk / "filling").write_bytes(bytes(room.f_bavail * room.f_frsize - 150_000))
        fails("No space left on device")
        num_kept = num_lines(disk / "sweep.jsonl")
        assert 0 < num_kept < 200 and not [*disk.glob(".*")]
        remount(disk, "ro")
        fails("Read-only file system")
        remount(disk, "rw,size=100m")
        assert merge(disk).problems == [] and merged_generation(disk) == 1
        assert len(export_dataset(old, "cogvideo", disk / "data", clips="copy").exported) == 30
        capkit.run_sweep(captioner, str(clip), **sweep)
        check_whole(disk / "sweep.jsonl", 200)
        print(f"with room again: all complete, {num_kept} of 200 captions of the sweep were kept")
