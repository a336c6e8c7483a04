"""What a model sees, made where a clip is read: the pixels of the original's arithmetic, and nothing else kept."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from video_factory import encode_clip, reason

from capkit.video import ClipReader, FrameSampling, draw_strip, load_clip, model_pixels

SIZES = [(2160, 3840), (1080, 1920), (480, 854), (854, 480), (333, 777), (1911, 1079), (144, 176), (225, 224)]
SIZES += [(224, 224), (56, 100), (8, 6), (6, 8), (1, 1), (1, 30), (30, 1)]


def originals_pixels(frames, image_size):
    """As the original: torch resizes all of a frame, bilinear; then the middle is cut out and normalised."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    height, width = video.shape[2:]
    short = min(height, width)
    resized = (int(height / short * image_size), int(width / short * image_size))
    video = F.interpolate(video, size=resized, mode="bilinear", align_corners=False)
    top, left = (round((side - image_size) / 2) for side in resized)
    video = video[:, :, top : top + image_size, left : left + image_size] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ((video - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).numpy()


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("image_size", [56, 224])
def test_pixels_are_the_originals(height, width, image_size):
    """Of noise, where neighbours differ most: to 1e-5."""
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    pixels = model_pixels(frames, image_size)
    assert pixels.shape == (2, 3, image_size, image_size) and pixels.dtype == np.float32
    assert np.abs(pixels - originals_pixels(frames, image_size)).max() < 1e-5
    turned = frames.transpose(0, 2, 1, 3)[:, ::-1]  # not contiguous
    assert np.array_equal(model_pixels(turned, image_size), model_pixels(turned.copy(), image_size))


@pytest.mark.parametrize("timeout_seconds", [None, 60])
@pytest.mark.parametrize("name", ["plain.mp4", "odd-size.mp4", "turned.mp4", "uneven.mkv", "one-frame.mp4"])
@pytest.mark.parametrize("sampling", ["chat", "base", FrameSampling("uniform", 5, decoder="decord")])
def test_a_clip_read_for_a_model_has_all_that_the_full_one_gives(clips, name, sampling, timeout_seconds):
    """ "base" names the frames of short clips several times."""
    full, seen = (
        load_clip(clips(name), sampling, timeout_seconds=timeout_seconds, image_size=size, with_strip=True)
        for size in (None, 56)
    )
    assert full.seen is None and full.frames.shape[1:3] == (full.info.height, full.info.width) != (56, 56)
    assert np.array_equal(seen.pixels(56), full.pixels(56)) and seen.checksum == full.checksum
    assert (seen.frame_indices, seen.info, repr(seen.frame_sampling)) == (
        full.frame_indices,
        full.info,
        repr(full.frame_sampling),
    )
    assert seen.frames.shape == (len(full), 56, 56, 3) and seen.frames.dtype == np.uint8
    mean, std = ([[[48.145466]], [[45.78275]], [[40.821073]]], [[[26.862954]], [[26.130258]], [[27.577711]]])
    levels = (full.pixels(56) * np.array(std) + np.array(mean)) * 2.55
    assert np.abs(seen.frames.transpose(0, 3, 1, 2) - levels).max() < 0.51
    assert seen.seen.strip == draw_strip(seen.frames)
    assert load_clip(clips(name), sampling, timeout_seconds=None, image_size=56).seen.strip is None


def test_another_models_clip_is_refused(clips):
    clip = load_clip(clips("plain.mp4"), image_size=56)
    with pytest.raises(ValueError, match=r"plain.mp4.* was read with image_size=56; .* with image_size=224"):
        clip.pixels(224)
    for wrong in (0, -56, 5.5, "56"):
        with pytest.raises((ValueError, TypeError), match="image_size"):
            load_clip(clips("plain.mp4"), image_size=wrong)


def test_large_clips_are_handed_over_small_and_never_held(clips, tmp_path):
    """Eight 4K frames are 199 MB; what a model sees of them is 6 MB."""
    path = encode_clip(tmp_path / "4k.mp4", range(8), fps=1, size=(2160, 3840), options={"preset": "ultrafast"})
    limits = {"timeout_seconds": None, "memory_bytes": 2**25}
    assert "8 frames of 3840 x 2160 pixels take 0.2 GiB" in reason(load_clip, path, **limits)
    clip = load_clip(path, **limits, image_size=224, with_strip=True)
    assert len(clip) == 8 and clip.nbytes == 8 * 224 * 224 * 3 * 5
    assert len(pickle.dumps(clip)) < 1.01 * clip.nbytes + 50_000
    assert (clip.info.height, clip.info.width) == (2160, 3840)


def test_reading_processes_import_no_torch(clips):
    code = "import sys; from capkit.video import load_clip; clip = load_clip(sys.argv[1], 'chat', 0, None, None, "
    code += "image_size=56, with_strip=True); print(len(clip.seen.strip) > 100, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, clips("plain.mp4")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_worker_process_loads_no_torch(clips):
    with ClipReader() as reader:
        load_clip(clips("plain.mp4"), reader=reader, image_size=56, with_strip=True)
        with open(f"/proc/{reader.pid}/maps") as maps:
            libraries = maps.read()
    assert "libavcodec" in libraries and "libtorch" not in libraries
