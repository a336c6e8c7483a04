"""Training data from caption stores, in the layouts of the CogVideoX trainers, each read back as its trainer does."""

from capkit.export.choosing import choose_records
from capkit.export.cleaning import CLEANING, clean
from capkit.export.exporting import LAYOUTS, export_dataset
from capkit.export.report import ExportReport
from capkit.export.writing import ExportError

__all__ = ["CLEANING", "LAYOUTS", "ExportError", "ExportReport", "choose_records", "clean", "export_dataset"]
