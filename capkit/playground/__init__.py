"""Live widgets: try prompts, rate captions blind, mark them. ipywidgets live here only."""

from capkit.playground.blind import BlindRating
from capkit.playground.looked import Looked
from capkit.playground.marking import Marking
from capkit.playground.panel import Playground
from capkit.playground.table import browse

__all__ = [
    "BlindRating",
    "Looked",
    "Marking",
    "Playground",
    "browse",
]
