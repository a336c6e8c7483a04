"""A store of a million records: what each operation takes, and that all of it fits into less than 1 GB of memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from store_records import an_error, make_record

from capkit import Prompt
from capkit.runs import Shard
from capkit.runs.clips import Item
from capkit.runs.shards import SETTINGS_OF_RUN, write_plan

NUM_RECORDS, NUM_SHARDS = int(os.environ.get("CAPKIT_SOAK_RECORDS", 10**6)), 4
NAME = "0" * 18 + "77"
SENTENCE = f" Dog {NAME} runs over the lawn, turns at the tree, and comes back to the man in the red coat with a stick."
VIDEO = Path(f"/data/a folder of clips/some more of them/{NAME}.mp4")
RECORD = make_record(77, VIDEO, request=NAME, strip=f"{NAME}.webp", text=SENTENCE * 8, mean_logprob=-0.5)
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
gallery = capkit.views.write_gallery(store, order_by="mean_logprob", limit=100_000)
report("gallery: all put in order")
gallery.save(folder / "gallery" / "gallery.html")
report("gallery: the first 100,000 written")
"""


@pytest.mark.soak
def test_soak_a_million_records(tmp_path):
    assert shutil.disk_usage(tmp_path).free > 15e9
    templates = [json.dumps(record) for record in (an_error(RECORD), RECORD)]
    for index in range(NUM_SHARDS):
        planned = []
        with open(tmp_path / f"{Shard(index, NUM_SHARDS).name}.jsonl", "w") as file:
            for number in range(index, NUM_RECORDS, NUM_SHARDS):
                name = f"{number:020}"
                file.write(templates[number % 50 > 0].replace(NAME, name).replace("-0.5", f"-{number * 7 % 10_007}e-4"))
                file.write("\n")
                planned.append(SETTINGS | {"request": name, "video": RECORD["video"].replace(NAME, name)})
        write_plan(tmp_path, Shard(index, NUM_SHARDS), [Item("all")], planned, Prompt("Describe."))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    print(f"\n{NUM_RECORDS:,} records of {size / NUM_RECORDS:,.0f} bytes")
    for code in (MERGE, READ):
        subprocess.run([sys.executable, "-c", SETUP + code, tmp_path], check=True)
    assert len(list((tmp_path / "gallery").iterdir())) == min(100, -(-NUM_RECORDS // 1000))
    shutil.rmtree(tmp_path)  # pytest would keep the last three
