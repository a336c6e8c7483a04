"""Which frames trainers take: as their own loaders do, for clips of all lengths and rates."""

import numpy as np
import pytest
from trainer_truth import LOADERS, frames_taken

from capkit.runs import TRAINERS, TrainerSettings, trainer_indices, trainer_problem, trainer_span

RATES = (8.0, 10.0, 12.0, 15.0, 16.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 48.0, 50.0, 60.0)
MORE = {"sat": [{}, {"rate": 16}], "videox-fun": [{}, {"stride": 1}, {"stride": 4}]}
NAMES = {"rate": "frames_per_second"}


def settings_of(num_frames, more):
    return TrainerSettings(num_frames, **{NAMES.get(name, name): value for name, value in more.items()})


def test_all_trainers_have_a_loader_to_compare_with():
    assert {*TRAINERS} == {*LOADERS}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_frames_are_those_that_the_trainers_loader_takes(trainer):
    """Clips of 1 to 200 frames at 5 to 60 a second; the spans hold just the frames from the first to the last."""
    for more in MORE.get(trainer, [{}]):
        for num_frames in (9, 49, 81):
            settings = settings_of(num_frames, more)
            for count in (*range(1, 9), *range(16, 201)):
                for fps in (5.0, *RATES) if trainer == "sat" else (25.0,):
                    truth = frames_taken(trainer, count, fps, num_frames, **more)
                    assert trainer_indices(trainer, count, fps, settings) == truth, (count, fps, settings)
                    assert bool(trainer_problem(trainer, count, fps, settings)) == (not truth)
                    span = trainer_span(trainer, (times := np.arange(count) / fps), fps, settings)
                    if truth:
                        start, end = span[0], np.inf if span[1] is None else span[1]
                        inside = np.flatnonzero((times >= start) & (times < end))
                        assert (inside[0], inside[-1], len(inside)) == (truth[0], truth[-1], truth[-1] - truth[0] + 1)
                    else:
                        assert span is None


@pytest.mark.parametrize("count, fps", [(50, 8), (51, 8), (99, 16), (147, 24000 / 1001)])
def test_sat_stops_at_clips_hardly_longer_than_it_takes(count, fps):
    assert "it stops, because it wants frame" in trainer_problem("sat", count, fps)
    assert not trainer_problem("sat", count - 3, fps) and not trainer_problem("sat", count + 2, fps)


def test_what_is_said_of_clips_that_cannot_be_taken():
    assert "5 frames at 4 a second" not in trainer_problem("sat", 30, 4.0)
    assert "30 frames at 4 a second: it stops at fewer than the 8 a second" in trainer_problem("sat", 30, 4.0)
    assert "6 frames are too few: it drops the first and the last 3" in trainer_problem("sat", 6, 25.0)
    assert "4 frames are too few: it keeps 4k + 1" in trainer_problem("diffusers", 4, 25.0)
    assert "48 frames are too few" in trainer_problem("cogvideox-factory", 48, 25.0)
    assert "2 frames are too few" in trainer_problem("videox-fun", 2, 25.0)


class TestSettings:
    def test_of_a_dictionary(self):
        assert TrainerSettings.of("sat", {"num_frames": 81, "frames_per_second": 16}) == TrainerSettings(81, 16.0)
        assert (
            TrainerSettings.of("cogkit", None)
            == TrainerSettings.of("cogkit", {"num_frames": None})
            == TrainerSettings()
        )

    @pytest.mark.parametrize("trainer, values, message", [
        ("cogkit", {"frames_per_second": 16}, "frames_per_second=16: has no effect on 'cogkit'; it belongs to 'sat'"),
        ("sat", {"stride": 2}, "stride=2: has no effect on 'sat'; it belongs to 'videox-fun'"),
        ("sat", {"num_frame": 2}, "unknown field 'num_frame'; did you mean 'num_frames'"),
        ("sat", {"num_frames": 0}, "num_frames must be a whole number, at least 1; got 0"),
        ("cogkit", {"num_frames": 50}, "num_frames=50: 'cogkit' takes only 8 N . 1"),
        ("musubi", TrainerSettings(50), "num_frames=50: 'musubi' takes only 4 N . 1"),
        ("cogkit", "cogkit", "trainer='cogkit': must be a dictionary"),
        ("sat", {"frames_per_second": -8}, "frames_per_second must be a positive number"),
    ])  # fmt: skip
    def test_nonsense_is_refused(self, trainer, values, message):
        with pytest.raises(ValueError, match=message):
            TrainerSettings.of(trainer, values)
