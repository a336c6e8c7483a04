"""Captioning at scale: a data set in shards, each a process anywhere; in the end one store of them all, accounted for.

A shard is idempotent: killed and started again, it does what is missing. All that it writes stands in one folder:

    shard-00000-of-00008.jsonl             its caption store
    shard-00000-of-00008.plan.json         what it has to do
    shard-00000-of-00008.heartbeat.json    how far it is
    shard-00000-of-00008.quarantine.jsonl  clips that the process reading them did not survive
    ray-....jsonl                          the store of a captioner on Ray
    captions_strips/                       the frames of all clips as the model saw them
    captions.jsonl                         all captions, once `merge` has found them complete
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from capkit.captioning import GREEDY, Captioner, DecodingLike
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike
from capkit.files import atomic_write, atomic_writer, now
from capkit.runs.caption import caption_planned, plan_clips
from capkit.runs.clips import Item
from capkit.runs.prefetch import Quarantine
from capkit.runs.store import CaptionStore
from capkit.video import FrameSampling

MERGED = "captions.jsonl"
SETTINGS_OF_RUN = ("model_fingerprint", "dtype", "quantization", "template", "frame_numbers", "history", "decoding")
SETTINGS_OF_RUN += ("frame_sampling",)


class ShardBusy(Exception):
    """Another process is at work on this shard."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, the first is 0: every `count`-th item.

    Raises:
        ValueError: index and count that do not go together.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count}: must be from 0/{self.count} to one below the count")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from "2/8"."""
        if not (match := re.fullmatch(r"(\d+)/(\d+)", text)):
            raise ValueError(f"shard {text!r}: must be like 2/8, the first is 0/8")
        return cls(*map(int, match.groups()))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """What Slurm's arrays, srun's tasks and torchrun's ranks say, also an array of several tasks; else 0/1."""
        get = environment.get
        inner = cls()
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if get(rank) and get(size):
                inner = cls(int(get(rank)), int(get(size)))
                break
        if not get("SLURM_ARRAY_TASK_ID"):
            return inner
        first, step = int(get("SLURM_ARRAY_TASK_MIN", 0)), int(get("SLURM_ARRAY_TASK_STEP", 1))
        outer = cls((int(get("SLURM_ARRAY_TASK_ID")) - first) // step, int(get("SLURM_ARRAY_TASK_COUNT", 1)))
        return outer.split(inner)

    def split(self, inner: Shard) -> Shard:
        """Part `inner` of this shard."""
        return Shard(self.index + self.count * inner.index, self.count * inner.count)

    def of(self, items: Sequence) -> list:
        """Its items."""
        return list(items[self.index :: self.count])

    @property
    def name(self) -> str:
        return f"shard-{self.index:05}-of-{self.count:05}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def caption_shard(
    load: Callable[[], Captioner],
    items: Iterable[Item],
    output_dir: str | os.PathLike,
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
    frame_sampling: FrameSampling | str | dict[str, Any] = "chat",
) -> list[dict[str, Any]]:
    """Caption one shard of the items into its own store in a folder that all shards share; do only what is missing.

    Args:
        load: makes the captioner, such as `lambda: load_captioner("demo")`; called once nothing else can go wrong.
        items: all items, of which the shard takes its own; the same in the same order for every shard.
        output_dir: see the module's text. Captions of a run with another number of shards count too.
        shard: a `Shard`, or text such as "2/8".
        retry_errors: try again what failed before, but for clips in quarantine.
        retry_quarantined: also these; the shard's quarantine file is renamed to `....old`.
        batch_size, timeout_seconds, num_readers, memory_bytes: as in `caption_planned`.
        cut: from the shard's items to parts of them: see `capkit.runs.windows`.
        prompt, decoding, frame_sampling: as in `caption_clips`.

    Returns:
        The current record of each of the shard's items, or of their parts, in order.

    Raises:
        ShardBusy: another process is at work on this shard; a dead one's lock does not count.
        ValueError: settings that no clip could be captioned with.
        OSError: the folder cannot be written; what is captioned is kept.
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
    current = {record["request"]: record for each in [*others, store] for record in each.current()}
    return [current[settings["request"]] for settings in planned]


@contextmanager
def hold_shard(folder: Path, shard: Shard) -> Iterator[Path]:
    """Hold a shard's lock, which the system lets go when the process ends, however it ends; gives its heartbeat file.

    Raises:
        ShardBusy: somebody else holds it.
        OSError: the folder cannot be written.
    """
    path, heartbeat = folder / f"{shard.name}.lock", folder / f"{shard.name}.heartbeat.json"
    path.touch()  # an error that says what is wrong with the folder, where something is
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        try:
            beat = json.loads(heartbeat.read_text())
            holder = f"process {beat['pid']} on {beat['host']}, which last showed life at {beat['updated']}"
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
    """Write down what a shard has to do, for `merge`."""
    digest = hashlib.sha256(json.dumps([astuple(item) for item in items]).encode()).hexdigest()[:20]
    of_run = {"num_shards": shard.count, "num_items": len(items), "items": digest, "written": now()}
    settings = planned and {name: planned[0][name] for name in SETTINGS_OF_RUN} | {"prompt": prompt.text}
    clips = [[settings["request"], settings["video"]] for settings in planned]
    plan = of_run | {"settings": settings, "shard": shard.index, "clips": clips}
    atomic_write(folder / f"{shard.name}.plan.json", json.dumps(plan, ensure_ascii=False))


def shard_stores(folder: Path) -> list[Path]:
    """The stores in a folder: of all shards of whatever run, of captioners on Ray, and what was merged before."""
    found = [path for pattern in ("shard-*.jsonl", "ray-*.jsonl", MERGED) for path in folder.glob(pattern)]
    return sorted(path for path in found if not path.name.endswith(".quarantine.jsonl"))


@dataclass(frozen=True)
class Merged:
    """What `merge` found.

    Attributes:
        store: all captions, in the order of the manifest.
        num_ok, num_errors: clips with a caption, and with an error.
        problems: what is missing or does not go together, in words; empty when every clip is accounted for.
    """

    store: CaptionStore
    num_ok: int
    num_errors: int
    problems: list[str]

    def __str__(self) -> str:
        told = f"{self.num_ok} captions and {self.num_errors} errors in {self.store.path}"
        return "\n".join([told, *(f"problem: {problem}" for problem in self.problems)])


def merge(output_dir: str | os.PathLike) -> Merged:
    """Put the shards' stores together into `captions.jsonl`, and see that every clip has one current record.

    The run counts that was started last, should the folder hold several. Idempotent, and also of use while shards are
    at work. Lines of `captions.jsonl` that are of other requests, and edits by hand, are kept.

    Raises:
        ValueError: the folder holds no shards.
    """
    folder = Path(output_dir).expanduser()
    plans, problems = _plans(folder)
    found, edits = _latest_lines(shard_stores(folder))
    merged = CaptionStore(folder / MERGED)
    lines, count = [], {"ok": 0, "error": 0}
    width = max(len(plan["clips"]) for plan in plans.values())
    planned = dict(
        plan["clips"][row] for row in range(width) for _, plan in sorted(plans.items()) if row < len(plan["clips"])
    )
    kept = [line for line in merged.lines() if line.get("request") not in planned]
    kept += [edit for edit in edits if edit not in kept]
    for request, video in planned.items():
        if request in found:
            lines.append(found[request])
            count[found[request].status] += 1
        else:
            problems.append(f"no record of {video}")
    _write_merged(merged.path, kept, lines)
    return Merged(merged, count["ok"], count["error"], problems)


def _plans(folder):
    """The plans of the run that was started last, by shard; and what is wrong with them."""
    plans = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("shard-*.plan.json")]
    if not plans:
        raise ValueError(f"{folder}: holds no shards; `python -m capkit caption-shard` makes them")
    last = max(plans, key=lambda plan: plan["written"])
    problems, of_run = [], {}
    for plan in plans:
        if plan["num_shards"] == last["num_shards"]:
            of_run[plan["shard"]] = plan
            if plan["items"] != last["items"]:
                problems.append(f"shard {plan['shard']}/{plan['num_shards']} was made from another list of clips")
            elif plan["settings"] and last["settings"] and plan["settings"] != last["settings"]:
                other = [name for name in last["settings"] if plan["settings"][name] != last["settings"][name]]
                told = f"differ in {', '.join(other)} from those of shard {last['shard']}"
                problems.append(f"settings of shard {plan['shard']}/{plan['num_shards']} {told}")
    never = [index for index in range(last["num_shards"]) if index not in of_run]
    problems += [f"shard {index}/{last['num_shards']} was never started" for index in never]
    return of_run, problems


@dataclass(frozen=True)
class _Line:
    path: Path
    offset: int
    status: str
    created: str


def _latest_lines(paths) -> tuple[dict[str, _Line], list[dict[str, Any]]]:
    """Where the current record of each request stands: one that is ok before an error, the later before the earlier.

    And the edits by hand, which are few.
    """
    latest: dict[str, _Line] = {}
    edits = []
    for path in paths:
        offset = 0
        with open(path, "rb") as file:
            for content in file:
                try:
                    record = json.loads(content) if content.endswith(b"\n") else {}
                except ValueError:  # torn
                    record = {}
                if "edits" in record:
                    edits.append(record)
                elif "request" in record:
                    line = _Line(path, offset, record["status"], record.get("created", ""))
                    before = latest.get(record["request"], line)
                    latest[record["request"]] = max(before, line, key=lambda x: (x.status == "ok", x.created, x.offset))
                offset += len(content)
    return latest, edits


def _write_merged(path, kept, lines):
    with ExitStack() as stack:
        files = {each: stack.enter_context(open(each, "rb")) for each in {line.path for line in lines}}
        target = stack.enter_context(atomic_writer(path))
        for line in kept:
            target.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        for line in lines:
            files[line.path].seek(line.offset)
            target.write(files[line.path].readline())
