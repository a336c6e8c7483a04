"""Which frames trainers take: as their own loaders do, for clips of all lengths and rates."""

import numpy as np
import pytest
from trainer_truth import LOADERS, frames_taken

from capkit import FrameSampling
from capkit.runs import TRAINERS, TrainerSettings, trainer_indices, trainer_problem, trainer_span

RATES = (8.0, 10.0, 12.0, 15.0, 16.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 48.0, 50.0, 60.0)
MORE = {"sat": [{}, {"rate": 16}], "videox-fun": [{}, {"stride": 1}, {"stride": 4}]}
MORE |= {"videotuna": [{}, {"stride": 2}, {"stride": 5}], "open-sora": [{}, {"rate": 16}]}
BY_RATE = dict.fromkeys(("open-sora", "onetrainer"), (8.0, 16.0, 24000 / 1001, 24.0, 30.0, 60.0))
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
            for count in (*range(1, 9), *range(16, 201, 1 if trainer in ("sat", "videox-fun") else 3)):
                for fps in (5.0, *RATES) if trainer == "sat" else BY_RATE.get(trainer, (25.0,)):
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


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("sampling", ["chat", "base", "uniform", {"strategy": "fps", "frames_per_second": 3}])
def test_captioned_frames_are_frames_of_the_trainer(trainer, sampling):
    """Of clips of 16 to 200 frames at 8 to 60 a second; "uniform" spreads 24 evenly over those of the trainer."""
    sampling = FrameSampling.of(sampling)
    for count in range(16, 201, 8):
        for fps in (8.0, 16.0, 24000 / 1001, 25.0, 30.0, 60.0):
            truth, times = frames_taken(trainer, count, fps), np.arange(count) / fps
            if not truth:
                continue
            span, only = trainer_span(trainer, times, fps), trainer_indices(trainer, count, fps)
            seen = sampling.frame_indices(times, fps, *span, only_frames=only)
            assert {*seen} <= {*truth}, (count, fps)
            if sampling.strategy == "uniform":
                even = np.linspace(truth[0], truth[-1], sampling.num_frames)
                widest = max(np.diff(truth), default=0) / 2
                assert seen == truth if len(truth) <= 24 else [seen[0], seen[-1]] == [truth[0], truth[-1]]
                assert len(truth) <= 24 or max(abs(even[:, None] - seen).min(1)) <= widest + 1e-9, (count, fps)


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
    assert "48 frames are too few: it leaves out" in trainer_problem("simpletuner", 48, 25.0)
    assert "1 frame is too few: it drops the first, and stops" in trainer_problem("onetrainer", 1, 25.0)
    assert "97 frames are too few: it passes over clips of fewer than 98" in trainer_problem(
        "videotuna", 97, 25.0, TrainerSettings(49, stride=2)
    )
    assert "8 frames at 25 a second are too few: they fill none of its buckets" in trainer_problem("open-sora", 8, 25.0)


class TestSettings:
    def test_of_a_dictionary(self):
        assert TrainerSettings.of("sat", {"num_frames": 81, "frames_per_second": 16}) == TrainerSettings(81, 16.0)
        assert (
            TrainerSettings.of("cogkit", None)
            == TrainerSettings.of("cogkit", {"num_frames": None})
            == TrainerSettings()
        )

    @pytest.mark.parametrize(
        "trainer, rate, stride",
        [("sat", 8, None), ("open-sora", 24, None), ("videox-fun", None, 3), ("videotuna", None, 1)],
    )
    def test_defaults_are_the_trainers_own(self, trainer, rate, stride):
        for values in (None, {}, TrainerSettings()):
            assert TrainerSettings.of(trainer, values) == TrainerSettings(49, rate, stride)

    @pytest.mark.parametrize("trainer, values, message", [
        ("cogkit", {"frames_per_second": 16}, "frames_per_second=16: has no effect on 'cogkit'; it belongs to 'sat'"),
        ("sat", {"stride": 2}, "stride=2: has no effect on 'sat'; it belongs to 'videox-fun'"),
        ("cogkit", TrainerSettings(stride=2), "stride=2: has no effect on 'cogkit'; .* 'videox-fun' and 'videotuna'"),
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
