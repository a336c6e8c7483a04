"""Which frames are sampled; no video is needed."""

import json

import numpy as np
import pytest
from paths import DATA

from capkit.video import FrameSampling
from capkit.video.sampling import base_indices, chat_indices, fps_indices, uniform_indices

GOLDEN = json.loads((DATA / "sampling.json").read_text())


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_chat_and_base_choose_what_the_original_chooses(case):
    times, fps = case["timestamps"], case["average_fps"]
    assert chat_indices(times) == case["chat"]
    assert base_indices(len(times), fps) == case["base"]
    assert FrameSampling("chat").frame_indices(times, fps) == case["chat"]
    assert FrameSampling("base").frame_indices(times, fps) == case["base"]


def test_chat_takes_the_first_of_equally_near_frames():
    assert chat_indices([0.0, 0.5, 1.5]) == [0, 1, 2]  # round(1.5) = 2; 0.5 and 1.5 are as far from 1
    assert chat_indices([0.0, 0.5]) == [0]  # round(0.5) = 0
    assert chat_indices([0, 1, 2, 3], num_frames=2) == [0, 1]


def test_base_never_counts_below_the_first_frame():
    assert base_indices(10, 1 / 120, num_frames=3) == [0, 0, 0]  # int(60 / 120) = 0 frames in the first minute
    assert base_indices(600, 5, num_frames=3) == [0, 149, 299]


def test_uniform_spreads_over_time_and_repeats_nothing():
    assert uniform_indices([0, 1, 2, 3, 4, 5, 6, 7, 8], num_frames=3) == [0, 4, 8]
    assert uniform_indices([0, 0.1, 0.2, 0.3, 10], num_frames=3) == [0, 3, 4]  # by time, not by count
    assert uniform_indices([0, 0.1, 0.2, 0.3, 100], num_frames=4) == [0, 3, 4]  # two times fall on one frame
    assert uniform_indices([5.0, 6.0], num_frames=24) == [0, 1]
    assert uniform_indices([5.0, 6.0], num_frames=1) == [0]


def test_fps_takes_one_frame_a_tick():
    times = np.arange(100) / 10
    assert fps_indices(times, 2, num_frames=5) == [0, 5, 10, 15, 20]
    assert fps_indices(times, 1) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert fps_indices(times, 0.25) == [0, 40, 80]
    assert fps_indices(times, 1e12, num_frames=4) == [0, 1, 2, 3]  # faster than the video: each frame once, and soon
    assert fps_indices(times, 1e300) == list(range(24))
    assert fps_indices([0.0, 3.0, 3.5], 1) == [0, 1]  # ticks 0, 1 and 2, 3: no repeats
    assert fps_indices([7.0], 1) == [0]


def test_fps_equals_the_rule_spelt_out():
    rng = np.random.default_rng(0)
    for _ in range(200):
        times = np.sort(rng.uniform(0, 5, rng.integers(1, 30)))
        rate = float(rng.choice([0.3, 1, 2.5, 10, 30]))
        expected = []
        for tick in np.arange(0, times[-1] + 1e-6, 1 / rate):
            nearest = int(np.abs(times - tick).argmin())
            if nearest not in expected:
                expected.append(nearest)
        assert fps_indices(times, rate, num_frames=1000) == expected


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: chat_indices([]), "timestamps_seconds"),
        (lambda: chat_indices([0.0, float("nan")]), "timestamps_seconds"),
        (lambda: chat_indices([0.0], num_frames=0), "num_frames must be a whole number"),
        (lambda: uniform_indices([0.0], num_frames=2.0), "num_frames must be a whole number"),
        (lambda: base_indices(0, 25.0), "num_video_frames"),
        (lambda: base_indices(10, 0.0), "average_fps"),
        (lambda: base_indices(10, float("nan")), "average_fps"),
        (lambda: fps_indices([0.0], -1), "frames_per_second must be a positive number"),
        (lambda: FrameSampling("chatty"), "'chatty'; did you mean 'chat'? there are: chat, base, uniform, fps"),
        (lambda: FrameSampling("chat", num_frames=True), "num_frames"),
        (lambda: FrameSampling("base", 10**9), "num_frames must be at most 1000000"),
        (lambda: FrameSampling("fps"), "needs frames_per_second: {"),
        (lambda: FrameSampling("chat", frames_per_second=2), "frames_per_second has no effect"),
        (lambda: FrameSampling.of({"strategy": "fps", "rate": 2}), "strategy"),
        (lambda: FrameSampling.of({"num_frames": 2}), "strategy"),
        (lambda: FrameSampling.of(24), "24; there are: chat"),
        (lambda: FrameSampling("chat").frame_indices([0.0], 25, start_seconds=-1), "start_seconds"),
        (lambda: FrameSampling("chat").frame_indices([0.0], 25, start_seconds=2, end_seconds=2), "end_seconds"),
    ],
)
def test_nonsense_is_an_error_that_names_it(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


def test_frame_sampling_from_name_dict_and_itself():
    sampling = FrameSampling("fps", num_frames=8, frames_per_second=2)
    assert FrameSampling.of(sampling) is sampling
    assert FrameSampling.of({"strategy": "fps", "num_frames": 8, "frames_per_second": 2}) == sampling
    assert FrameSampling.of("base") == FrameSampling("base", 24, None)


def test_frame_sampling_becomes_plain_json_values():
    sampling = FrameSampling("fps", num_frames=np.int64(3), frames_per_second=np.float32(2))
    assert sampling == FrameSampling("fps", 3, 2)
    written = json.dumps(sampling.to_dict())
    assert written == '{"strategy": "fps", "num_frames": 3, "frames_per_second": 2.0}'
    assert FrameSampling.of(json.loads(written)) == sampling


def test_a_window_is_half_open_and_counts_from_its_start():
    times = np.arange(100) / 10
    assert FrameSampling("chat").frame_indices(times, 10, 2.5, 5.5) == [25, 35, 45, 54]  # 5.5 itself is outside
    assert FrameSampling("base", 3).frame_indices(times, 10, 2.5, 5.6) == [25, 40, 55]
    assert FrameSampling("uniform", 3).frame_indices(times, 10, 2.5, 5.6) == [25, 40, 55]
    assert FrameSampling("fps", 24, 1).frame_indices(times, 10, start_seconds=7.5) == [75, 85, 95]
    assert FrameSampling("chat").frame_indices(times, 10, 50, 60) == []


def test_numpy_rates_are_plain_numbers():
    """As printed: float(np.float32(0.3)) would be 0.30000001192092896, and another request."""
    assert FrameSampling("fps", frames_per_second=np.float32(0.3)) == FrameSampling("fps", frames_per_second=0.3)
    with pytest.raises(ValueError, match="frames_per_second must be a positive number"):
        FrameSampling("fps", frames_per_second=10**400)
