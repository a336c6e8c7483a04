"""Windows cut out of videos: the very frames, at their own times, in a file that is complete or not there."""

from fractions import Fraction

import numpy as np
import pytest
from video_factory import encode_clip, read_numbers, reason

from capkit import load_clip
from capkit.video import cutting
from capkit.video.cutting import cut_clip
from capkit.video.reading import read_frames, read_timestamps


def all_frames(path):
    return read_frames(str(path), lambda times, info: [*range(len(times))])[0]


@pytest.mark.parametrize("kind, settings", [
    ("mp4", {"fps": 25, "options": {"bf": "3"}, "keyframe_interval": 20}),
    ("mp4", {"fps": Fraction(24000, 1001)}),
    ("mkv", {"milliseconds": [i * i + 10 * i for i in range(60)]}),
    ("webm", {"codec": "libvpx-vp9"}),
    ("mp4", {"quarter_turns": 1, "size": (64, 96)}),
    ("mp4", {"size": (95, 127), "pix_fmt": "yuv444p"}),
    ("mp4", {"audio": True}),
])  # fmt: skip
def test_the_very_frames_at_their_own_times(tmp_path, monkeypatch, kind, settings):
    monkeypatch.setattr(cutting, "READ_BYTES", 7 * 96 * 128 * 3)  # a few frames at a time
    source, target = encode_clip(tmp_path / f"a.{kind}", range(60), **settings), tmp_path / "cut.mp4"
    cut_clip(str(source), 13, 49, str(target), 18)
    before, after = read_timestamps(str(source))[0][13:50], read_timestamps(str(target))[0]
    assert np.allclose(after, before - before[0], atol=2e-4) and len(after) == 37
    assert read_numbers(all_frames(target)) == list(range(13, 50))
    assert {path.name for path in tmp_path.iterdir()} == {source.name, target.name}
    rates = [load_clip(path, "base").info.average_fps for path in (source, target)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6) or kind == "mkv"
    assert load_clip(target).info.codec == "h264"


def test_colours_stay_as_they_are_and_crf_decides_how_well(tmp_path):
    colours = np.array([(200, 30, 40), (20, 180, 60), (30, 40, 210), (220, 210, 40)], np.uint8)

    def draw(number, height, width):
        return np.repeat(np.repeat(colours.reshape(2, 2, 3), height // 2, 0), width // 2, 1)

    source = encode_clip(tmp_path / "a.mp4", range(8), draw=draw)
    differences, sizes = [], []
    for crf in (0, 18, 45):
        cut_clip(str(source), 0, 7, str(tmp_path / "cut.mp4"), crf)
        difference = np.abs(all_frames(source).astype(int) - all_frames(tmp_path / "cut.mp4"))
        differences.append(difference.mean())
        sizes.append((tmp_path / "cut.mp4").stat().st_size)
    assert differences[0] <= differences[1] < 3 and sizes[0] > sizes[2]


def test_decord_sees_the_same_frames(tmp_path):
    decord = pytest.importorskip("decord")
    source = encode_clip(tmp_path / "a.mp4", range(60), options={"bf": "3"})
    cut_clip(str(source), 5, 30, str(tmp_path / "cut.mp4"), 18)
    reader = decord.VideoReader(str(tmp_path / "cut.mp4"))
    assert len(reader) == 26 and reader.get_avg_fps() == 25
    assert read_numbers(reader.get_batch(range(26)).asnumpy()) == list(range(5, 31))


def test_what_cannot_be_read_or_written_leaves_nothing(tmp_path, monkeypatch):
    source = encode_clip(tmp_path / "a.mp4", range(20))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(source.read_bytes()[:-900])
    assert "cut short" in reason(cut_clip, str(broken), 2, 9, str(tmp_path / "cut.mp4"), 18)
    with pytest.raises(OSError, match="cut.mp4"):
        cut_clip(str(source), 2, 9, str(tmp_path / "no folder" / "cut.mp4"), 18)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cut_clip(str(source), 2, 9, str(tmp_path / "cut.mp4"), 18)
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "broken.mp4"}
