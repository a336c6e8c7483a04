"""Caption many clips into a store, on one or many machines; runs resume after crashes, bad clips and full disks."""

from capkit.console import is_interactive
from capkit.files import output_folder
from capkit.runs.auditing import Audit, audit
from capkit.runs.caption import caption_clips, check_numbers
from capkit.runs.clip_ids import clip_id, seen_part, window_name
from capkit.runs.clips import DEMO_CLIPS, find_clips
from capkit.runs.digests import digest_once
from capkit.runs.fields import check_fields, clip_seconds, filled_prompt, prompt_title, setting
from capkit.runs.filters import Where, column_text, matching, parse_where, select
from capkit.runs.index import LATER_SETTINGS, SETTINGS, Records, is_stopped, mark_text, record_text
from capkit.runs.lines import MARK_FIELDS, MARKS, OUTDATED
from capkit.runs.manifests import Item, choose_columns, read_rows
from capkit.runs.merging import merge, unmerged
from capkit.runs.prefetch import read_ahead
from capkit.runs.progress import Progress
from capkit.runs.project_root import enter_project_root
from capkit.runs.ray_engine import caption_on_ray
from capkit.runs.replacing import Batch, Replacement, replace, undo
from capkit.runs.shards import Shard, ShardBusy, caption_shard, shard_stores
from capkit.runs.store import (
    RECORD_FIELDS,
    CaptionStore,
    CaptionStoreLike,
    StoreBusy,
    new_record,
    request_settings,
    to_frame,
)
from capkit.runs.trainers import (
    TRAINERS,
    TrainerSettings,
    check_trainer,
    trainer_indices,
    trainer_problem,
)
from capkit.runs.windows import cut_into, trainer_span, unseen_by_trainer, write_webvtt

__all__ = [
    "Audit",
    "audit",
    "caption_clips",
    "check_numbers",
    "clip_id",
    "clip_seconds",
    "seen_part",
    "window_name",
    "DEMO_CLIPS",
    "Item",
    "find_clips",
    "filled_prompt",
    "check_fields",
    "prompt_title",
    "setting",
    "choose_columns",
    "read_rows",
    "read_ahead",
    "Progress",
    "is_interactive",
    "enter_project_root",
    "output_folder",
    "caption_on_ray",
    "Shard",
    "ShardBusy",
    "caption_shard",
    "merge",
    "unmerged",
    "shard_stores",
    "RECORD_FIELDS",
    "CaptionStore",
    "CaptionStoreLike",
    "StoreBusy",
    "SETTINGS",
    "Records",
    "is_stopped",
    "mark_text",
    "record_text",
    "Where",
    "column_text",
    "matching",
    "parse_where",
    "select",
    "LATER_SETTINGS",
    "MARK_FIELDS",
    "MARKS",
    "OUTDATED",
    "Batch",
    "Replacement",
    "replace",
    "undo",
    "new_record",
    "request_settings",
    "digest_once",
    "to_frame",
    "TRAINERS",
    "TrainerSettings",
    "check_trainer",
    "trainer_indices",
    "trainer_problem",
    "cut_into",
    "trainer_span",
    "unseen_by_trainer",
    "write_webvtt",
]
