"""Export captions and clips as training data, in the layouts of CogVideoX trainers, read back as each trainer does."""

from capkit.export.choose import choose_records
from capkit.export.cleaning import CLEANING, clean
from capkit.export.clip_files import EXPORT_OPTIONS, choose_for
from capkit.export.dataset import check_export, export_dataset
from capkit.export.layouts import LAYOUTS
from capkit.export.report import ExportReport
from capkit.export.write import ExportBusy, ExportError

__all__ = [
    "CLEANING",
    "EXPORT_OPTIONS",
    "LAYOUTS",
    "ExportBusy",
    "ExportError",
    "ExportReport",
    "check_export",
    "choose_for",
    "choose_records",
    "clean",
    "export_dataset",
]
