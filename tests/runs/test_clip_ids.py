"""Which clip a caption is of: every window of a video is a clip of its own."""

import itertools

import pytest

from capkit import Decoding
from capkit.runs import clip_id, request_settings, seen_part, window_name
from capkit.runs.store import ModelIdentity

WINDOWS = [(0.0, None), (0.0, 2.0), (2.0, 4.0), (2.0, None), (2.0000001, None), (1e7 + 0.25, None), (1e7 + 0.5, None)]


def record(video, start, end):
    return request_settings(ModelIdentity("m", "f", "float32", None), video, "Why?", Decoding(), "chat", start, end)


def test_each_window_is_one_clip_and_settings_make_no_other():
    pairs = list(itertools.product(["/clips/a.mp4", "/clips/sub/a.mp4"], WINDOWS))
    assert len({clip_id(record(video, *window)) for video, window in pairs}) == len(pairs)
    one = record("/clips/a.mp4", 2, 4)
    assert clip_id(one) == clip_id(one | {"prompt": "Who?", "decoding": {}, "frame_sampling": "base"})
    assert clip_id(one) == "/clips/a.mp4#t=2.0,4.0" and clip_id(record("/clips/a.mp4", 0, None)) == "/clips/a.mp4"
    assert clip_id({"video": "/clips/a.mp4"}) == "/clips/a.mp4"  # of a record that says nothing of windows


@pytest.mark.parametrize(
    "start, end, name",
    [
        (0, None, ""),
        (0, 2.5, "0 to 2.5 s"),
        (4, 6, "4 to 6 s"),
        (8, None, "8 s to the end"),
        (3600.5, 3601, "3600.5 to 3601 s"),
    ],
)
def test_a_window_in_words(start, end, name):
    assert window_name({"video": "a.mp4", "start_seconds": start, "end_seconds": end}) == name


@pytest.mark.parametrize(
    "times, duration, start, part",
    [
        (range(24), 60.0, 0.0, "24 of 60 s"),
        (range(24), 24.4, 0.0, ""),
        (range(10), 9.6, 0.0, ""),
        ([2.5 * i for i in range(24)], 120.0, 0.0, "60 of 120 s"),
        ([2.5 * i for i in range(24)], 60.0, 0.0, ""),
        ([5 + i for i in range(24)], 40.0, 5.0, "24 of 40 s"),  # in a window that begins at 5 s
        ([5 + i for i in range(24)], 24.0, 5.0, ""),
        ([0.0], 7200.25, 0.0, "1 of 7200.2 s"),
        ([0.0], 0.04, 0.0, ""),
        (None, 60.0, 0.0, ""),
        (range(24), None, 0.0, ""),
    ],
)
def test_how_much_a_caption_rests_on(times, duration, start, part):
    found = {"timestamps_seconds": times and [float(time) for time in times], "duration_seconds": duration}
    assert seen_part({"video": "a.mp4", "start_seconds": start} | found) == part
