"""Caption many clips into a store, on one or many machines; runs resume after crashes, bad clips and full disks."""

from capkit.runs.caption import caption_clips
from capkit.runs.clip_ids import clip_id, window_name
from capkit.runs.clips import DEMO_CLIPS, Item, find_clips, read_rows
from capkit.runs.prefetch import read_ahead
from capkit.runs.progress import Progress, is_interactive
from capkit.runs.project_root import enter_project_root
from capkit.runs.ray_engine import caption_on_ray
from capkit.runs.shards import Shard, ShardBusy, caption_shard, merge
from capkit.runs.store import (
    STRIP_FRAME_PIXELS,
    CaptionStore,
    is_stopped,
    new_record,
    request_settings,
    sha256_if_there,
)
from capkit.runs.windows import cut_into, unseen_by_trainer, write_webvtt

__all__ = [
    "caption_clips",
    "clip_id",
    "window_name",
    "DEMO_CLIPS",
    "Item",
    "find_clips",
    "read_rows",
    "read_ahead",
    "Progress",
    "is_interactive",
    "enter_project_root",
    "caption_on_ray",
    "Shard",
    "ShardBusy",
    "caption_shard",
    "merge",
    "STRIP_FRAME_PIXELS",
    "CaptionStore",
    "is_stopped",
    "new_record",
    "request_settings",
    "sha256_if_there",
    "cut_into",
    "unseen_by_trainer",
    "write_webvtt",
]
