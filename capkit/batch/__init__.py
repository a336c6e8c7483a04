"""Many papermill runs from a table, each once."""

from capkit.batch.batch import Batch, check_parameters, run_command
from capkit.batch.table import Run, Table, TableError, read_table

__all__ = [
    "Batch",
    "run_command",
    "check_parameters",
    "Run",
    "Table",
    "TableError",
    "read_table",
]
