"""A click on a word shows its frames."""

import dataclasses

import pytest

from capkit.captioning import attend
from capkit.playground import Looked
from capkit.views import word_frames


def test_a_click_on_a_word_shows_its_frames(captioner, random_clip):
    clip = random_clip(3)
    looked = attend(captioner, clip, "The red star.")
    panel = Looked(looked, clip)
    assert [button.description for button in panel.buttons.children] == ["The", "red", "star."]
    assert panel.place == 1 and panel.shown.value == word_frames(looked, clip, 1).html  # the first content word
    panel.buttons.children[2].click()
    assert panel.place == 2 and panel.shown.value == word_frames(looked, clip, 2).html
    assert [button.button_style for button in panel.buttons.children] == ["", "", "info"]


def test_what_cannot_be_shown_is_refused(captioner, random_clip):
    looked = attend(captioner, random_clip(3), "The red star.")
    with pytest.raises(ValueError, match="3 frames, but a clip of 2"):
        Looked(looked, random_clip(2))
    with pytest.raises(ValueError, match="no words"):
        Looked(dataclasses.replace(looked, tokens=[""] * len(looked.tokens)), random_clip(3))
