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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from capkit.captioning import GREEDY, Captioner, DecodingLike
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike
from capkit.files import atomic_write, now, output_folder, read_regular, unused_name
from capkit.runs.caption import caption_planned, check_numbers, current_records, plan_clips
from capkit.runs.index import LATER_SETTINGS
from capkit.runs.manifests import Item
from capkit.runs.prefetch import Quarantine
from capkit.runs.store import CaptionStore, StoreBusy
from capkit.text import warn
from capkit.video import FrameSamplingLike

MERGED = "captions.jsonl"
MOST_SHARDS = 10**6
SETTINGS_OF_RUN = "model_fingerprint dtype quantization template frame_numbers history decoding frame_sampling".split()


class ShardBusy(StoreBusy):
    """Another process is working on this shard."""

    advice = "is at work on this shard; wait for it, or end it"


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count`: every `count`-th item.

    Raises:
        ValueError: not 0 <= index < count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"shard {self.index}/{self.count}: there must be at least 1 shard, such as 0/1")
        if not 0 <= self.index < self.count:
            last = f"{self.count - 1}/{self.count}"
            raise ValueError(
                f"shard {self.index}/{self.count}: shards count from 0, the last of {self.count} is {last}"
            )

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
            try:
                return int(environment.get(name) or default)
            except ValueError:
                raise ValueError(f"environment variable {name}={environment[name]!r}: must be a number") from None

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
        ValueError: settings that are invalid for every clip, or a folder that cannot be written.
        OSError: writing fails, for example on a full disk; earlier captions are kept.
    """
    shard = Shard.parse(shard) if isinstance(shard, str) else shard
    check_numbers(batch_size, timeout_seconds, num_readers)
    folder = output_folder(output_dir)
    items = list(dict.fromkeys(items))
    store = shard_store(folder, shard)
    with store.hold(ShardBusy):
        quarantined = folder / f"{shard.name}.quarantine.jsonl"
        if retry_quarantined and quarantined.exists():
            quarantined.rename(unused_name(Path(f"{quarantined}.old")))
        if counts := _other_counts(folder, shard):
            message = (
                f"{folder}: holds shards of {' and of '.join(counts)}, this is one of {shard.count}: a run of its "
            )
            warn(f"{message}own, whose shards `merge` will all expect", stacklevel=2)
        captioner = load()
        planned = plan_clips(captioner, cut(shard.of(items)), prompt, decoding, frame_sampling)
        write_plan(folder, shard, items, planned, Prompt.of(prompt))
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
            heartbeat=heartbeat_path(folder, shard),
            label="" if shard.count == 1 else f"shard {shard}: ",
            num_readers=num_readers,
            memory_bytes=memory_bytes,
        )
    return current_records(planned, [*others, store])


def shard_store(folder: Path, shard: Shard) -> CaptionStore:
    """A shard's own store; all share a folder of picture strips."""
    return CaptionStore(folder / f"{shard.name}.jsonl")


def heartbeat_path(folder: Path, shard: Shard) -> Path:
    """The file of a shard's progress."""
    return folder / f"{shard.name}.heartbeat.json"


def write_plan(
    folder: Path, shard: Shard, items: Sequence[Item], planned: Sequence[dict[str, Any]], prompt: Prompt
) -> None:
    """Write the shard's clips and settings to its plan file, which `merge` reads.

    Runs are counted, because the clocks of hosts differ: a shard that belongs to a run in the folder has its number,
    any other the next one.
    """
    names = [name for name in (*SETTINGS_OF_RUN, *LATER_SETTINGS) if planned and name in planned[0]]
    plan: dict[str, Any] = {
        "num_shards": shard.count,
        "items": hashlib.sha256(json.dumps([astuple(item) for item in items]).encode()).hexdigest()[:20],
        "settings": planned and {name: planned[0][name] for name in names} | {"prompt": prompt.text},
    }
    others = []
    for path in plan_files(folder):
        with suppress(ValueError):  # a damaged one, which may be this shard's
            others.append(read_plan(path) | {"clips": []})
    same = [other["run"] for other in others if not plan_differences(plan, other)]
    plan |= {
        "run": max(same, default=1 + max((other["run"] for other in others), default=0)),
        "written": now(),
        "shard": shard.index,
        "clips": [[settings["request"], settings["video"]] for settings in planned],
    }
    atomic_write(folder / f"{shard.name}.plan.json", json.dumps(plan, ensure_ascii=False))


def plan_files(folder: Path) -> list[Path]:
    """The plans of shards in a folder."""
    return sorted(folder.glob("shard-*.plan.json"))


def _other_counts(folder: Path, shard: Shard) -> list[str]:
    """The numbers of shards of other runs in a folder; [] if another shard of this one is there, too."""
    counts = dict.fromkeys(path.name.split(".")[0].split("-of-")[-1] for path in plan_files(folder))
    this = f"{shard.count:05}"
    return [] if this in counts else [count.lstrip("0") for count in counts]


def read_plan(path: Path) -> dict[str, Any]:
    """A plan as `write_plan` wrote it; of a plan from before runs were counted, `run` is 0.

    Raises:
        ValueError: it is damaged.
    """
    content = read_regular(path)
    try:
        plan = {"run": 0} | json.loads(content)
        texts = [plan["items"], plan["written"], *chain.from_iterable(plan["clips"])]
        numbers = [plan[name] for name in ("run", "num_shards", "shard")]
        if {*map(type, texts)} != {str} or {*map(type, numbers)} != {int} or {*map(len, plan["clips"])} - {2}:
            raise ValueError("a field has another type")
        if not 0 <= plan["shard"] < plan["num_shards"] <= MOST_SHARDS:
            raise ValueError("its shard, or their number, is out of range")
        if plan["settings"] and {*SETTINGS_OF_RUN, "prompt"} - plan["settings"].keys():
            raise ValueError("a setting is missing")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged ({error!r}); delete it and start this shard again") from error
    return plan


def plan_differences(plan: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what keeps two plans from being of one run: num_shards, items, or settings by name."""
    names = [name for name in ("num_shards", "items") if plan[name] != other[name]]
    if plan["settings"] and other["settings"]:  # a shard without clips has none
        settings, others = plan["settings"], other["settings"]
        names += [name for name in settings | others if settings.get(name) != others.get(name)]
    return names


def shard_stores(folder: Path) -> list[Path]:
    """The stores in a folder: of shards of any run, of captioners on Ray, and the merged one."""
    stores = [path for pattern in ("shard-*.jsonl", "ray-*.jsonl", MERGED) for path in folder.glob(pattern)]
    return sorted(path for path in stores if not path.name.endswith(".quarantine.jsonl"))
