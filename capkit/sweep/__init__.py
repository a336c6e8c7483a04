"""Compare prompts, decoding settings and frame samplings: plan a sweep, run it, describe and compare its captions."""

from capkit.sweep.comparison import Conclusion, best_cells, compare, conclude
from capkit.sweep.diagnostics import (
    OPENING,
    SENTENCE_END,
    STOP_WORDS,
    agreement,
    count_words,
    describe,
    describe_set,
    near_duplicates,
    stock_opening,
)
from capkit.sweep.plan import PROMPT_PRESETS, SweepPlan, plan_sweep, read_axes
from capkit.sweep.ratings import OUTCOMES, bradley_terry, bradley_terry_pairs
from capkit.sweep.run import SweepResult, check_comparison, run_sweep
from capkit.sweep.t5 import COGVIDEOX_1_5_T5_LIMIT, COGVIDEOX_T5_LIMIT, t5_counter

__all__ = [
    "PROMPT_PRESETS",
    "SweepPlan",
    "plan_sweep",
    "read_axes",
    "SweepResult",
    "check_comparison",
    "run_sweep",
    "OPENING",
    "SENTENCE_END",
    "STOP_WORDS",
    "agreement",
    "describe",
    "describe_set",
    "count_words",
    "near_duplicates",
    "stock_opening",
    "OUTCOMES",
    "bradley_terry",
    "bradley_terry_pairs",
    "Conclusion",
    "best_cells",
    "compare",
    "conclude",
    "COGVIDEOX_1_5_T5_LIMIT",
    "COGVIDEOX_T5_LIMIT",
    "t5_counter",
]
