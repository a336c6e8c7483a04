"""Hundreds of odd files, each read in many ways and compared with what an ffmpeg program decodes in order."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from ffmpeg_truth import block_levels, decode_all, shown_numbers
from video_campaign import ENCODED, FIRST, RECIPES, CannotMake, Workshop

from capkit.video import ClipReader, FrameSampling, VideoError, load_clip

EVERY_FRAME = FrameSampling("uniform", num_frames=100_000)
UNTIMED = (".avi", ".h264", ".264", ".hevc", ".vvc", ".m2v", ".h263", ".drc", ".obu", ".mjpeg")
FPS = FrameSampling("fps", num_frames=60, frames_per_second=4)
QUICK = (
    "h264/open-pyramid.mp4 h264/intra-refresh-b.ts h264/open.avi hevc/leading.mkv vp9/hidden.webm "
    "mpeg2/b-frames.mpg filtered/vp9-hidden-webm-split.webm filtered/av1-aom-mkv-split.mkv codecs/tiff.mov "
    "uneven/growing.mp4 offset/-0.5.mkv cut/h264-open.mkv-fast.mp4 joined/open-ts.ts appended/mixed-size.ts "
    "boxes/source-edit-middle.mp4 boxes/source-renamed-ctts.mp4 boxes/source-turn-6.mp4 "
    "boxes/source-nonsense-4.mp4 filtered/h264-closed-pyramid-mkv-flipped.mkv "
    "filtered/hevc-interlaced-ts-no-idr.mkv joined/mixed-codec-2-ts.mkv"
).split()


def check(path, truth, reader):
    """ "right", "refused: why", "told: what", "doubtful: what" or "wrong in silence: what", after reading in all ways.

    "told": the clip's notes say that frames are as stored, and they are.
    """
    times = refused = doubt = told = None
    for sampling, start, end in requests(truth):
        try:
            clip = load_clip(path, sampling, start, end, 60, reader)
        except VideoError as error:
            empty = truth is not None and not FrameSampling.of(sampling).frame_indices(truth.seconds, 25, start, end)
            if not (empty and error.reason.startswith("no frame starts")):
                refused = refused or "refused: " + re.sub(r"[\d.]+", "#", error.reason)[:90]
            continue
        if truth is None:
            return "wrong in silence: frames of a file without any"
        if sampling == EVERY_FRAME:
            times = clip.timestamps_seconds
            told = next((f"told: {note}" for note in clip.info.notes if "frames are as stored" in note), None)
            if told and "rotated" in told:
                truth = decode_all(path, upright=False)
            elif told:
                truth = replace(truth, aspect=clip.frames.shape[2] / clip.frames.shape[1])
        difference = compare(clip, truth, times, sampling, start, end)
        if difference and truth.complaints and shows_what_ffmpeg_shows(clip, truth):
            doubt = doubt or "doubtful: the same pictures at the same times, but ffmpeg lost others to errors"
            continue
        if difference:
            request = f"{FrameSampling.of(sampling).strategy}, from {start:g} s to {end}"
            return f"wrong in silence: {difference} ({request})"
        late = np.abs(clip.timestamps_seconds - truth.seconds[clip.frame_indices]).max()
        if late > guessed(path, truth):
            return f"wrong in silence: times off by {late:g} s"
        if late > 1e-3:
            doubt = doubt or f"doubtful: times off by {late:g} s, but ffmpeg guesses too"
    return refused or doubt or told or "right"


def guessed(path, truth):
    """By how many seconds times may differ: by a few frames where ffmpeg only guesses, seen in times that go back."""
    steps = np.diff(truth.seconds)
    if len(steps) and not steps.any():
        return np.inf  # no times at all: ffmpeg has rounded enormous ones to one number
    is_sure = path.suffix not in UNTIMED and bool((steps > 0).all())
    rounding = 1e-3 + 1e-7 * float(truth.seconds.max())  # times are float32 numbers, as in decord
    return rounding if is_sure else max(rounding, 3 * float(np.median(steps)))


def requests(truth):
    """(sampling, start_seconds, end_seconds): every frame, all four samplings of the file, and of windows."""
    yield EVERY_FRAME, 0, None
    for sampling in ("chat", "base", "uniform", FPS):
        yield sampling, 0, None
    last = 0 if truth is None else truth.seconds.max()
    if last > 0:
        yield "chat", 0.31 * last, 0.77 * last
        yield "base", 0.31 * last, None
        yield "uniform", 0.503 * last, 0.951 * last
        yield FPS, 0.17 * last, 0.402 * last


def compare(clip, truth, times, sampling, start, end):
    """What is wrong with a clip, its times aside; None: nothing.

    `times`: the reader's own of every frame, to break ties as it does; None: not known.
    """
    if clip.info.num_frames != len(truth.seconds):
        return f"{clip.info.num_frames} frames instead of {len(truth.seconds)}"
    times = truth.seconds if times is None else times
    indices = FrameSampling.of(sampling).frame_indices(times, clip.info.average_fps, start, end)
    if clip.frame_indices != indices:
        return f"indices {clip.frame_indices} instead of {indices}"
    far = np.abs(block_levels(clip.frames) - truth.levels[indices]).max(axis=(1, 2)) > 100
    if far.any():
        return f"{far.sum()} of {len(far)} other pictures, first at index {indices[far.argmax()]}"
    height, width = clip.frames.shape[1:3]
    if abs(width / height / truth.aspect - 1) > 0.04:
        return f"{width} x {height} for an aspect ratio of {truth.aspect:.3f}"
    return None


def shows_what_ffmpeg_shows(clip, truth):
    """Whether each picture of a clip is the one that ffmpeg shows at its time."""
    nearest = np.abs(clip.timestamps_seconds[:, None] - truth.seconds).argmin(axis=1)
    off = np.abs(clip.timestamps_seconds - truth.seconds[nearest]).max()
    return off < 1e-3 and np.abs(block_levels(clip.frames) - truth.levels[nearest]).max() <= 100


def campaign(shop, names, truths):
    """Outcome of each file that can be made; fills `truths`, by name, where they are missing."""
    outcomes = {}
    with ClipReader() as reader:
        for name in names:
            try:
                path = shop.file(name)
            except CannotMake:
                continue
            if name not in truths:
                truths[name] = decode_all(path)
            outcomes[name] = check(path, truths[name], reader)
    return outcomes


def report(title, outcomes, truths):
    """Print the outcomes by family, the reasons for refusals, and every file that is wrong."""
    table, kinds = {}, Counter()
    for name, outcome in outcomes.items():
        kind = outcome.split(":")[0]
        table.setdefault(name.split("/")[0], Counter())[kind] += 1
        kinds[kind] += 1
    print(f"\n{title}: {len(outcomes)} files, {dict(kinds)}, {kinds['refused'] / len(outcomes):.1%} refused")
    for family, counts in table.items():
        print(f"  {family:10} " + ", ".join(f"{counts[kind]} {kind}" for kind in counts))
    reasons = Counter(outcome for outcome in outcomes.values() if outcome.startswith("refused"))
    for reason, count in reasons.most_common():
        clean = [n for n, o in outcomes.items() if o == reason and truths[n] and not truths[n].complaints]
        print(f"  {count:4} {reason}; {len(clean)} of them without complaint from ffmpeg: {', '.join(clean[:4])}")
    wrong = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.startswith("wrong")]
    print("\n".join(f"  {line}" for line in wrong))
    return wrong


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="module")
def truths():
    """What ffmpeg decodes, by the name of the recipe; filled on the way."""
    return {}


def test_a_few_odd_files_against_ffmpeg(shop, truths):
    outcomes = campaign(shop, QUICK, truths)
    assert outcomes.keys() == set(QUICK)
    assert not report("quick", outcomes, truths)


@pytest.mark.soak
@pytest.mark.parametrize("load", ["quiet", "under load"])
def test_soak_hundreds_of_odd_files_against_ffmpeg(shop, truths, load, request):
    if load == "under load":
        request.getfixturevalue("cpu_load")
    names = list(RECIPES) if load == "quiet" else list(RECIPES)[::3]
    outcomes = campaign(shop, names, truths)
    wrong = report(load, outcomes, truths)
    assert len(outcomes) >= 400
    encoded = [name for name in outcomes if name.split("/")[0] in ENCODED and truths[name]]
    sure = [name for name in encoded if shown_numbers(truths[name], FIRST) == list(range(len(truths[name].levels)))]
    print(f"ffmpeg shows all the numbers that were drawn in {len(sure)} of {len(encoded)} files encoded here")
    assert len(sure) > 0.9 * len(encoded)
    assert not wrong
