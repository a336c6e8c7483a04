"""Live widgets for notebook 04: try prompts, rate captions blind. ipywidgets live here only."""

from capkit.playground.blind import BlindRating
from capkit.playground.panel import Playground
from capkit.playground.table import browse

__all__ = [
    "BlindRating",
    "Playground",
    "browse",
]
