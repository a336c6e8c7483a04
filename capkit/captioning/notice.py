"""What to say beside a caption of a clip that the demo model cannot know."""

from __future__ import annotations

from typing import Any

import numpy as np

from capkit.video import is_drawing

DEMO_NOTICE = "The demo model knows only simple shapes on plain backgrounds; its captions of other clips are nonsense."


def demo_notice(model: Any, frames: np.ndarray) -> str:
    """DEMO_NOTICE if the model is the demo model and the frames are no drawing of shapes (`is_drawing`), else "".

    Args:
        model: its name, as in `Captioner.name` and caption records.
        frames: uint8 RGB (T, H, W, 3), as the model sees them.
    """
    return DEMO_NOTICE if model == "demo" and not is_drawing(frames) else ""
