"""Headers that are wrong never end in an exception. `test_pictures.py` tests what right ones cut away."""

import random

import pytest
from video_factory import damage

from capkit.video.headers import NONE, declared_size, matroska_cropping, mp4_cropping


@pytest.mark.parametrize("name, index", [("plain.mp4", b"moov"), ("sound.mkv", b"\x16\x54\xae\x6b")])
def test_damaged_headers(clips, tmp_path, name, index):
    data = clips(name).read_bytes()
    at, path = data.index(index) - 4, tmp_path / name
    for seed in range(300):
        path.write_bytes(data[:at] + damage(data[at : at + 800], random.Random(seed)) + data[at + 800 :])
        cropping = mp4_cropping(str(path), 1) if name.endswith("mp4") else matroska_cropping(str(path), 0)
        assert len(cropping) == 4 and min(cropping) >= 0 and declared_size(str(path)) >= 0


@pytest.mark.parametrize("size", [2**32, 2**42, 2**63 - 1, 2**64 - 1])
def test_sizes_far_beyond_the_end(tmp_path, size):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\1free" + size.to_bytes(8, "big") + bytes(100))
    assert mp4_cropping(str(tmp_path / "a.mp4"), 1) == NONE
    size_field = (min(size, 2**56 - 2) | 1 << 56).to_bytes(8, "big")
    (tmp_path / "a.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + size_field + bytes(100))
    assert matroska_cropping(str(tmp_path / "a.mkv"), 0) == NONE
