"""Where the tests' data and the project are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "golden"
NOTEBOOKS = ROOT / "notebooks"
