"""Caption a data set in shards, one process each, on any machines; `merge` combines and checks their stores.

A shard is idempotent: killed and started again, it does what is missing. All shards write into one folder:

    shard-00000-of-00008.jsonl             its caption store
    shard-00000-of-00008.plan.json         its clips and settings
    shard-00000-of-00008.heartbeat.json    its progress
    shard-00000-of-00008.quarantine.jsonl  clips that crashed or hung the process that read them
    ray-....jsonl                          the store of a captioner on Ray
    captions_strips/                       the frames of all clips as the model saw them
    captions.jsonl                         all captions, written by `merge`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from capkit.captioning import GREEDY, Captioner, DecodingLike
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike
from capkit.files import atomic_write, atomic_writer, now
from capkit.runs.caption import caption_planned, current_records, plan_clips
from capkit.runs.clips import Item
from capkit.runs.prefetch import Quarantine
from capkit.runs.store import CaptionStore
from capkit.video import FrameSamplingLike

MERGED = "captions.jsonl"
SETTINGS_OF_RUN = "model_fingerprint dtype quantization template frame_numbers history decoding frame_sampling".split()


class ShardBusy(Exception):
    """Another process holds this shard's lock."""


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count`: every `count`-th item.

    Raises:
        ValueError: not 0 <= index < count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count}: must be from 0/{self.count} to one below the count")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from text such as "2/8"."""
        if not (match := re.fullmatch(r"(\d+)/(\d+)", text)):
            raise ValueError(f"shard {text!r}: must be like 2/8, the first is 0/8")
        return cls(*map(int, match.groups()))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """The shard of this Slurm array task, srun task or torchrun rank, also of several tasks per array job."""

        def number(name: str, default: int) -> int:
            return int(environment.get(name) or default)

        inner = cls()
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if environment.get(rank) and environment.get(size):
                inner = cls(number(rank, 0), number(size, 1))
                break
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        index = (number("SLURM_ARRAY_TASK_ID", first) - first) // step
        return cls(index, number("SLURM_ARRAY_TASK_COUNT", 1)).split(inner)

    def split(self, inner: Shard) -> Shard:
        """A part of this shard."""
        return Shard(self.index + self.count * inner.index, self.count * inner.count)

    def of(self, items: Sequence) -> list:
        """This shard's items."""
        return list(items[self.index :: self.count])

    @property
    def name(self) -> str:
        return f"shard-{self.index:05}-of-{self.count:05}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def caption_shard(
    load: Callable[[], Captioner],
    items: Iterable[Item],
    output_dir: str | os.PathLike[str],
    shard: Shard | str = Shard(),
    batch_size: int = 8,
    retry_errors: bool = False,
    retry_quarantined: bool = False,
    timeout_seconds: float | None = 60.0,
    num_readers: int = 2,
    memory_bytes: int | None = None,
    cut: Callable[[list[Item]], list[Item]] = list,
    prompt: PromptLike = DEFAULT_PROMPT,
    decoding: DecodingLike = GREEDY,
    frame_sampling: FrameSamplingLike = "chat",
) -> list[dict[str, Any]]:
    """Caption the missing clips of one shard into its own store, in a folder that all shards share.

    Args:
        load: makes the captioner, such as `lambda: load_captioner("demo")`; called once the shard is locked.
        items: all items, in the same order for every shard, which takes its own.
        output_dir: the folder, see this module's docstring. Captions of a run with another number of shards count too.
        shard: a `Shard`, or text such as "2/8".
        batch_size: clips that go through the model together.
        retry_errors: try clips again that failed before, except those in quarantine.
        retry_quarantined: those, too; the shard's quarantine file is renamed to `....old`.
        timeout_seconds: longest time to read one clip; None for no limit.
        num_readers: clips read at the same time, each in a child process.
        memory_bytes: approximate limit for clips from reading to caption; None: half of free memory, at most 8 GiB.
        cut: from the shard's items to parts of them, such as `cut_into`.
        prompt, decoding, frame_sampling: settings of every caption, see `caption_clips`.

    Returns:
        The current record of each of the shard's items, or of their parts, in order.

    Raises:
        ShardBusy: another process is working on this shard (a dead process holds no lock).
        ValueError: settings that are invalid for every clip.
        OSError: the folder cannot be written; earlier captions are kept.
    """
    shard = Shard.parse(shard) if isinstance(shard, str) else shard
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    items = list(dict.fromkeys(items))
    with hold_shard(folder, shard) as heartbeat:
        quarantined = folder / f"{shard.name}.quarantine.jsonl"
        if retry_quarantined and quarantined.exists():
            os.replace(quarantined, f"{quarantined}.old")
        captioner = load()
        planned = plan_clips(captioner, cut(shard.of(items)), prompt, decoding, frame_sampling)
        write_plan(folder, shard, items, planned, Prompt.of(prompt))
        store = CaptionStore(folder / f"{shard.name}.jsonl", folder / "captions_strips")
        same_run = f"-of-{shard.count:05}.jsonl"  # its other shards have other clips
        others = [CaptionStore(path) for path in shard_stores(folder) if not path.name.endswith(same_run)]
        caption_planned(
            captioner,
            planned,
            store,
            batch_size,
            retry_errors or retry_quarantined,
            timeout_seconds,
            other_stores=others,
            quarantine=Quarantine(quarantined),
            heartbeat=heartbeat,
            label="" if shard.count == 1 else f"shard {shard}: ",
            num_readers=num_readers,
            memory_bytes=memory_bytes,
        )
    return current_records(planned, [*others, store])


@contextmanager
def hold_shard(folder: Path, shard: Shard) -> Iterator[Path]:
    """Lock a shard until the block or the process ends, even by a crash; yields the path of the heartbeat file.

    Raises:
        ShardBusy: another process holds the lock.
        OSError: the folder cannot be written.
    """
    path, heartbeat = folder / f"{shard.name}.lock", folder / f"{shard.name}.heartbeat.json"
    path.touch()  # its error names the path
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        try:
            beat = json.loads(heartbeat.read_text())
            holder = f"process {beat['pid']} on {beat['host']} (last heartbeat {beat['updated']})"
        except (OSError, ValueError, KeyError):
            holder = "another process"
        raise ShardBusy(f"{path}: {holder} is at work on this shard; wait for it, or end it") from None
    try:
        yield heartbeat
    finally:
        lock.release()


def write_plan(
    folder: Path, shard: Shard, items: Sequence[Item], planned: Sequence[dict[str, Any]], prompt: Prompt
) -> None:
    """Write the shard's clips and settings to its plan file, which `merge` reads."""
    plan = {
        "num_shards": shard.count,
        "items": hashlib.sha256(json.dumps([astuple(item) for item in items]).encode()).hexdigest()[:20],
        "written": now(),
        "settings": planned and {name: planned[0][name] for name in SETTINGS_OF_RUN} | {"prompt": prompt.text},
        "shard": shard.index,
        "clips": [[settings["request"], settings["video"]] for settings in planned],
    }
    atomic_write(folder / f"{shard.name}.plan.json", json.dumps(plan, ensure_ascii=False))


def shard_stores(folder: Path) -> list[Path]:
    """The stores in a folder: of shards of any run, of captioners on Ray, and the merged one."""
    stores = [path for pattern in ("shard-*.jsonl", "ray-*.jsonl", MERGED) for path in folder.glob(pattern)]
    return sorted(path for path in stores if not path.name.endswith(".quarantine.jsonl"))


@dataclass(frozen=True)
class Merged:
    """Result of `merge`.

    Attributes:
        store: all captions, in the order of the manifest.
        num_ok, num_errors: clips with a caption, and with an error.
        problems: sentences about missing records and mismatched shards; empty when every clip is accounted for.
    """

    store: CaptionStore
    num_ok: int
    num_errors: int
    problems: list[str]

    def __str__(self) -> str:
        counts = f"{self.num_ok} captions and {self.num_errors} errors in {self.store.path}"
        return "\n".join([counts, *(f"problem: {problem}" for problem in self.problems)])


def merge(output_dir: str | os.PathLike[str]) -> Merged:
    """Combine the shards' stores into `captions.jsonl`, and check that every clip has one current record.

    Of several runs in the folder the one started last counts. Idempotent; can run while shards are at work. Hand edits
    and lines of other requests in `captions.jsonl` are kept.

    Raises:
        ValueError: the folder holds no shards.
    """
    folder = Path(output_dir).expanduser()
    plans, problems = _plans(folder)
    latest, edits = _latest_lines(shard_stores(folder))
    merged = CaptionStore(folder / MERGED)
    # Shards took every count-th clip: row by row over the shards is the manifest's order.
    rows = zip_longest(*(plan["clips"] for _, plan in sorted(plans.items())))
    planned = dict(clip for row in rows for clip in row if clip is not None)
    others = [line for line in merged.lines() if line.get("request") not in planned]
    kept = dict.fromkeys(json.dumps(line, ensure_ascii=False) for line in [*others, *edits])
    problems += [f"no record of {video}" for request, video in planned.items() if request not in latest]
    lines = [latest[request] for request in planned if request in latest]
    with ExitStack() as stack:
        files = {path: stack.enter_context(open(path, "rb")) for path in {line.path for line in lines}}
        target = stack.enter_context(atomic_writer(merged.path))
        target.writelines(line.encode() + b"\n" for line in kept)
        for line in lines:
            files[line.path].seek(line.offset)
            target.write(files[line.path].readline())
    num_ok = sum(line.is_ok for line in lines)
    return Merged(merged, num_ok, len(lines) - num_ok, problems)


def _plans(folder: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The plans, by shard, of the run that was started last; and its problems, in words."""
    plans = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("shard-*.plan.json")]
    if not plans:
        raise ValueError(f"{folder}: holds no shards; `python -m capkit caption-shard` makes them")
    last = max(plans, key=lambda plan: plan["written"])
    of_run = {plan["shard"]: plan for plan in plans if plan["num_shards"] == last["num_shards"]}
    problems = []
    for index in range(last["num_shards"]):
        shard, plan = f"shard {index}/{last['num_shards']}", of_run.get(index)
        if plan is None:
            problems.append(f"{shard} was never started")
        elif plan["items"] != last["items"]:
            problems.append(f"{shard} was made from another list of clips")
        elif plan["settings"] and last["settings"] and plan["settings"] != last["settings"]:
            names = [name for name in last["settings"] if plan["settings"][name] != last["settings"][name]]
            problems.append(f"settings of {shard} differ in {', '.join(names)} from those of shard {last['shard']}")
    return of_run, problems


class _Line(NamedTuple):
    """A record's place; of several records of a request the greatest is current: ok before errors, then the latest."""

    is_ok: bool
    created: str
    offset: int
    path: Path


def _latest_lines(paths: Iterable[Path]) -> tuple[dict[str, _Line], list[dict[str, Any]]]:
    """The place of each request's current record, so that captions need not fit into memory; and all hand edits."""
    latest: dict[str, _Line] = {}
    edits = []
    for path in paths:
        offset = 0
        with open(path, "rb") as file:
            for content in file:
                try:
                    record = json.loads(content) if content.endswith(b"\n") else {}
                except ValueError:  # a partial line
                    record = {}
                if "edits" in record:
                    edits.append(record)
                elif "request" in record:
                    line = _Line(record["status"] == "ok", record.get("created", ""), offset, path)
                    latest[record["request"]] = max(latest.get(record["request"], line), line)
                offset += len(content)
    return latest, edits
