"""A store of a million records: what each operation takes, and that all of it fits into less than 1 GB of memory."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from store_records import an_error, make_record
from video_factory import tiny_clip

from capkit import Prompt
from capkit.runs import Shard
from capkit.runs.clips import Item
from capkit.runs.shards import SETTINGS_OF_RUN, write_plan

NUM_RECORDS, NUM_SHARDS = int(os.environ.get("CAPKIT_SOAK_RECORDS", 10**6)), 4
WORDS = """dog cat man woman runs walks jumps turns stops looks over under past to from the a red blue green small large
    lawn tree house street camera and then slowly quickly towards away with without stick coat""".split()
LINKS_OF_A_FILE = 50_000  # ext4 takes 65,000
CONTENT = tiny_clip()
RECORD = make_record(77, Path("all"), video_sha256=hashlib.sha256(CONTENT).hexdigest())
SETTINGS = {name: RECORD[name] for name in SETTINGS_OF_RUN}

SETUP = r"""
import re, sys, time
from pathlib import Path
import capkit, capkit.export, capkit.runs, capkit.views
folder = Path(sys.argv[1])
store = capkit.CaptionStore(folder / "captions.jsonl")
started = time.monotonic()
def report(what):
    global started
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    print(f"{what}: {time.monotonic() - started:.0f} s, peak of memory so far {peak:.2f} GB", flush=True)
    assert peak < 1, what
    started = time.monotonic()
report("nothing but imports")
"""
MERGE = """
merged = capkit.runs.merge(folder)
print(merged)
assert not merged.problems
report("merge")
"""
READ = """
num_done = len(store.done(retry_errors=True))
report(f"open, done(): {num_done:,}")
request = store.current()[-1]["request"]
for number in range(100):
    store.edit(request, f"by hand {number}")
report("100 hand edits")
num_ok = sum(record["status"] == "ok" for record in store.current())
report(f"every record of current(): {num_ok:,}")
assert num_ok == num_done and store.current()[-1]["edited_text"] == "by hand 99"
gallery = capkit.views.captions_page(store, order_by="mean_logprob", limit=100_000)
report("gallery: all put in order")
gallery.save(folder / "gallery" / "gallery.html")
report("gallery: the first 100,000 written")
"""
EXPORT = """
exported = capkit.export.export_dataset(store.path, "cogvideo", folder / "data")
assert exported.counts["refused"] == sum(exported.counts[name] for name in ("exported", "refused")) // 50
report(f"export of {exported.counts['exported']:,} clips")
"""


def a_text(number):
    """Some 200 words, unlike those of other numbers."""
    words = random.Random(number).choices(WORDS, k=200)
    return " " + ". ".join(" ".join(words[start : start + 20]) for start in range(0, 200, 20)) + "."


@pytest.mark.soak
def test_soak_a_million_records(tmp_path):
    assert shutil.disk_usage(tmp_path).free > 15e9
    clips = tmp_path / "a folder of clips"
    clips.mkdir()
    for index in range(NUM_SHARDS):
        planned = []
        with open(tmp_path / f"{Shard(index, NUM_SHARDS).name}.jsonl", "w") as file:
            for number in range(index, NUM_RECORDS, NUM_SHARDS):
                name, content = f"{number:020}", tmp_path / f"{number // LINKS_OF_A_FILE}.content"
                if not content.exists():
                    content.write_bytes(CONTENT)
                os.link(content, clips / f"{name}.mp4")
                own = {"request": name, "video": str(clips / f"{name}.mp4")}
                record = RECORD | own | {"text": a_text(number), "mean_logprob": -(number * 7 % 10_007) / 1e4}
                print(json.dumps(record if number % 50 else an_error(record)), file=file)
                planned.append(SETTINGS | own)
        write_plan(tmp_path, Shard(index, NUM_SHARDS), [Item("all")], planned, Prompt("Describe."))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    print(f"\n{NUM_RECORDS:,} records of {size / NUM_RECORDS:,.0f} bytes")
    for code in (MERGE, READ, EXPORT):
        subprocess.run([sys.executable, "-c", SETUP + code, tmp_path], check=True)
    assert len(list((tmp_path / "gallery").iterdir())) == min(100, -(-NUM_RECORDS // 1000))
    shutil.rmtree(tmp_path)  # pytest would keep the last three
