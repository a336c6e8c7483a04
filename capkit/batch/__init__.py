"""Run notebooks with papermill: check their parameters, and run many of them from a table, each once."""

from capkit.batch.command import run_command, runs_to_do
from capkit.batch.parameters import check_parameters
from capkit.batch.pool import Pool
from capkit.batch.table import Run, Table, TableError, read_table

__all__ = ["run_command", "runs_to_do", "check_parameters", "Pool", "Run", "Table", "TableError", "read_table"]
