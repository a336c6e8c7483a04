"""What notebook 06 measures: capkit beside a plain baseline, as ratios."""

from capkit.benchmark.benchmark import PARTS, Benchmark
from capkit.benchmark.results import as_markdown, parts_of_a_caption, profile_table, read_results, to_frame

__all__ = [
    "PARTS",
    "Benchmark",
    "as_markdown",
    "parts_of_a_caption",
    "profile_table",
    "read_results",
    "to_frame",
]
