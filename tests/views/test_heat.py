"""Where the model looked: pictures are bright there and dark elsewhere, words are named and escaped."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from test_views import NASTY, assert_safe, text_of

import capkit
from capkit.captioning import ACCURACY, AttentionMap
from capkit.views import content_words, show_attention, word_frames
from capkit.views.heat import MOST_WORDS

GRID, NUM_FRAMES = 4, 3


def a_map(text, weights, edges=None):
    """Words of one token each, that give these weights (W, T, G, G) to patches and (W, T) to frames."""
    tokens = [f" {word}" for word in text.split(" ")]
    rows = [np.zeros((len(tokens) + 1, *np.shape(given)[1:]), np.float32) for given in (weights, weights)]
    rows[1] = np.full((len(tokens) + 1, NUM_FRAMES), 0.01, np.float32) if edges is None else edges
    for at in range(len(tokens)):  # a word is the mean of its row and the one before
        rows[0][at + 1] = 2 * weights[at] - rows[0][at]
    return AttentionMap([0] * len(tokens), tokens, np.array([0.0, 1.0, 2.5]), *rows)


@pytest.fixture
def clip():
    return capkit.Clip.from_frames(np.full((NUM_FRAMES, 40, 60, 3), 200, np.uint8), [0, 1, 2.5])


@pytest.fixture
def looked():
    weights = np.full((3, NUM_FRAMES, GRID, GRID), 0.01)
    weights[1, 1, 0, 3] = weights[2, 2, 3, 0] = 0.2  # "star" at the top right of frame 1, "falls." elsewhere
    edges = np.full((4, NUM_FRAMES), 0.01, np.float32)
    edges[2:, 0] = 0.5  # as a whole, "star" and "falls." attend to frame 0
    return a_map("The star falls.", weights, edges)


def pictures(html):
    """(alternative text, brightness of each patch) of each picture."""
    for data, alt in re.findall(r'base64,([^"]+)"[^>]* alt="([^"]*)"', html):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), float)
        side = len(pixels) // GRID
        yield alt, pixels[: side * GRID, : side * GRID].reshape(GRID, side, GRID, side).mean((1, 3))


def test_each_content_word_has_the_frame_with_its_place_and_the_one_it_attends_to_most(looked, clip):
    html = show_attention(looked, clip).html
    assert_safe(html)
    shown = list(pictures(html))
    assert [alt for alt, _ in shown[:4]] == [
        *("1.00 s", "0.00 s, as a whole", "2.50 s", "0.00 s, as a whole"),
    ]
    for (_, bright), place in ((shown[0], (0, 3)), (shown[2], (3, 0))):
        assert np.unravel_index(bright.argmax(), bright.shape) == place and bright.max() > 1.5 * np.median(bright)
    assert ">star</b>" in html and ">falls</b>" in html and ">The</b>" not in html
    assert ACCURACY in text_of(html)


def test_what_no_word_looked_at_is_dark(looked, clip):
    html = show_attention(looked, clip).html
    never = looked.never_looked_at
    unseen = list(pictures(html))[-NUM_FRAMES:]
    assert never.sum() == never.size - 2 and f"{100 * never.mean():.0f} % of all patches" in text_of(html)
    for (alt, bright), dark, seconds in zip(unseen, never, (0, 1, 2.5), strict=True):
        assert alt == f"{seconds:.2f} s, {100 * dark.mean():.0f} %"
        assert (bright[dark].mean() < 100) and (not (~dark).any() or bright[~dark].min() > bright[dark].mean() + 40)


def test_all_frames_of_a_word_with_their_shares(looked, clip):
    html = word_frames(looked, clip, 1).html
    shares = [re.search(r"(\d+) %", alt)[1] for alt, _ in pictures(html)]
    assert shares == [f"{100 * share:.0f}" for share in looked.frame_shares[1]]
    bright = np.array([patches for _, patches in pictures(html)])
    assert np.unravel_index(bright.argmax(), bright.shape) == (1, 0, 3)


def test_texts_are_escaped_and_long_ones_cut(clip):
    words = NASTY.split(" ")
    flat = np.full((len(words), NUM_FRAMES, GRID, GRID), 0.01)
    nasty = a_map(NASTY, flat)
    assert_safe(show_attention(nasty, clip).html)
    assert_safe(word_frames(nasty, clip, 0).html)
    many = MOST_WORDS + 5
    long = a_map(" ".join(["word", "the"] * many), np.full((2 * many, NUM_FRAMES, GRID, GRID), 0.01))
    assert len(content_words(long)) == many
    html = show_attention(long, clip).html
    assert html.count(">word</b>") == MOST_WORDS and "5 more words are left out" in html


def test_another_clip_is_refused(looked, random_clip):
    for show in (show_attention, lambda *given: word_frames(*given, 0)):
        with pytest.raises(ValueError, match="3 frames, but a clip of 5"):
            show(looked, random_clip(5))
