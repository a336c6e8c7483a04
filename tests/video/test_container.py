"""What is no video is refused, what was cut short says so, and reading has limits."""

import os
import random
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from video_factory import cut, encode_clip, read_numbers, reason

from capkit.video import ClipReader, FrameSampling, VideoError, load_clip

HERE = {"timeout_seconds": None}


def picture(path, size=(96, 128)):
    """Write a file of one picture with the encoder that its suffix asks for."""
    codec = {".jpg": "mjpeg", ".png": "png", ".bmp": "bmp", ".webp": "libwebp", ".gif": "gif", ".tiff": "tiff"}
    codec |= {".avif": "libsvtav1"}
    container_format = {".jpg": "image2", ".png": "image2", ".bmp": "image2", ".webp": "webp", ".tiff": "image2"}
    with av.open(str(path), "w", format=container_format.get(path.suffix)) as container:
        stream = container.add_stream(codec[path.suffix], rate=1)
        stream.height, stream.width = size
        stream.pix_fmt = {".jpg": "yuvj420p", ".gif": "rgb8", ".avif": "yuv420p", ".webp": "yuv420p"}.get(
            path.suffix, "rgb24"
        )
        if path.suffix == ".bmp":
            stream.pix_fmt = "bgr24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((*size, 3), 90, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff", ".gif", ".avif"])
def test_single_pictures_are_refused(tmp_path, suffix):
    path = picture(tmp_path / f"picture{suffix}")
    assert "not a video" in reason(load_clip, path, **HERE)
    renamed = path.rename(tmp_path / "picture.mp4")
    assert "not a video" in reason(load_clip, renamed, **HERE)


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4", "notes.nfo", "notes.ans", "notes.srt", "notes.mkv"])
def test_text_is_refused(tmp_path, name):
    """FFmpeg draws text in the look of an old terminal."""
    for text in (
        "A woman walks her dog.\n",
        "\x1b[31mRed\x1b[0m text\n" * 40,
        "1\n00:00:01,000 --> 00:00:02,000\nHi\n",
    ):
        (tmp_path / name).write_text(text)
        assert "not a video" in reason(load_clip, tmp_path / name, **HERE)


def test_lists_and_addresses_are_refused(tmp_path, clips):
    """They would open other files, or the network."""
    other = clips("plain.mp4")
    texts = {
        "ffconcat": f"ffconcat version 1.0\nfile '{other}'\n",
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{other}\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period></Period></MPD>',
        "avs": f'AviSource("{other}")\n',
    }
    for suffix, text in texts.items():
        for name in (f"list.{suffix}", f"{suffix}.mp4"):
            (tmp_path / name).write_text(text)
            assert "not a video" in reason(load_clip, tmp_path / name, **HERE)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a regular file" in reason(load_clip, tmp_path / "pipe.mp4", **HERE)
    assert "not a regular file" in reason(load_clip, "/dev/zero", **HERE)
    for address in ("pipe:0", "concat:a.mp4|b.mp4", "file:a.mp4", "-"):
        assert "no such file" in reason(load_clip, address, **HERE)
    assert "download it first" in reason(load_clip, "http://localhost/a.mp4", **HERE)
    assert "no such file; a pattern is for capkit.find_clips" in reason(load_clip, "clips/*.mp4", **HERE)


@pytest.mark.parametrize(
    "name", ["a.gif", "vp9.webm", "sound.mkv", "b-frames.flv", "b-frames.ts", "mpeg2.mpg", "stream.h264"]
)
def test_a_second_half_of_zeros_is_cut_short(clips, tmp_path, name):
    """As after an interrupted download into a file of the final size."""
    settings = {"codec": "gif", "pix_fmt": "rgb8"} if name == "a.gif" else {}
    data = clips(name, **settings).read_bytes()
    path = tmp_path / name
    path.write_bytes(data)
    assert load_clip(path, **HERE).info.num_frames == 60  # the whole file is read
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    words = reason(load_clip, path, **HERE)
    assert words.startswith("cut short: ") and "incomplete download?" in words


@pytest.mark.parametrize("name", ["a.gif", "b-frames.flv", "a.ogv", "vp9.webm", "h264.avi"])
def test_half_a_file_is_cut_short(clips, tmp_path, name):
    settings = {"a.gif": {"codec": "gif", "pix_fmt": "rgb8"}, "a.ogv": {"codec": "libvpx"}}.get(name, {})
    data = clips(name, **settings).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert reason(load_clip, tmp_path / name, **HERE).startswith("cut short: ")


def test_zeros_after_a_whole_file_do_no_harm(clips, tmp_path):
    """As cameras leave them that reserve room; FFmpeg tells where the last packet of an MP4 ends."""
    path = tmp_path / "padded.mp4"
    path.write_bytes(clips("plain.mp4").read_bytes() + bytes(50_000))
    assert load_clip(path, **HERE).info.num_frames == 60


def test_sound_that_lasts_longer_is_not_cut_short(tmp_path):
    path = encode_clip(tmp_path / "long-sound.mkv", audio=True, numbers=range(25), sound_seconds=9)
    assert load_clip(path, **HERE).info.num_frames == 25


# ---- memory ----------------------------------------------------------------------------------------------------------


def huge(path, size=(4096, 4096), num_frames=24):
    """A small file of large grey frames, one a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((size[0] * 3 // 2, size[1]), 128, np.uint8), format="yuv420p")
        for number in range(num_frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="measures with VmHWM")
def test_a_clip_may_not_take_more_memory_than_allowed(tmp_path):
    path = huge(tmp_path / "huge.mp4")
    assert path.stat().st_size < 500_000
    words = reason(load_clip, path, memory_bytes=2**30)
    assert "24 frames of 4096 x 4096 pixels take 1.1 GiB" in words and "sample fewer frames" in words
    clip = load_clip(path, FrameSampling("chat", 2), memory_bytes=2**30)
    assert clip.frames.shape == (2, 4096, 4096, 3)
    code = f"from capkit import load_clip; load_clip({str(path)!r}, memory_bytes=2**30, timeout_seconds=None)"
    script = f"try:\n    {code}\nexcept Exception as error: print(error)\nprint(open('/proc/self/status').read())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    peak_kb = next(int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("VmHWM"))
    assert "sample fewer frames" in run.stdout and peak_kb < 2**20  # within this process, too


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
@pytest.mark.parametrize("megabytes", [1, 30, 50, 80, 100, 160, 250])
def test_a_decoder_without_memory_is_not_a_damaged_file(tmp_path, megabytes):
    path = huge(tmp_path / "huge.mp4", num_frames=8)
    with ClipReader(memory_bytes=megabytes * 2**20) as reader:
        words = reason(load_clip, path, FrameSampling("chat", 1), reader=reader)
        assert "more memory than" in words and "sample fewer frames" in words


def test_limits_of_memory_are_checked(clips):
    for limit in (0, -1, float("nan"), "much"):
        with pytest.raises(ValueError, match="memory_bytes must be a positive number"):
            load_clip(clips("plain.mp4"), memory_bytes=limit)
    with pytest.raises(VideoError, match="60 frames of 128 x 96 pixels take 0.0 GiB"):
        load_clip(clips("plain.mp4"), FrameSampling("uniform", 60), memory_bytes=1000, **HERE)
    clip = load_clip(clips("plain.mp4"), memory_bytes=2**28)
    assert read_numbers(clip.frames) == clip.frame_indices


def test_an_index_that_claims_millions_of_frames(clips, tmp_path):
    data = bytearray(clips("plain.mp4").read_bytes())
    claimed = (33_000_000).to_bytes(4, "big")
    for box, at in ((b"stsz", 8), (b"stts", 8), (b"stsc", 12)):  # number of samples, of equal durations, in a chunk
        place = data.index(box) + 4 + at
        data[place : place + 4] = claimed
    place = data.index(b"stsz") + 8
    data[place : place + 4] = (1).to_bytes(4, "big")  # a byte each
    path = tmp_path / "claims.mp4"
    path.write_bytes(data)
    for memory_bytes in (None, 2**29):  # FFmpeg alone takes more than the latter
        assert "cut short: its index promises 33000000 frames" in reason(load_clip, path, memory_bytes=memory_bytes)


@pytest.mark.parametrize("codec, suffix", [("flv", "flv"), ("wmv2", "wmv"), ("rv20", "rm")])
def test_whole_files_with_few_frames_a_second_are_not_cut_short(tmp_path, codec, suffix):
    """Their packets do not say how long the last frame lasts."""
    for count, fps in ((1, 25), (2, 25), (5, 1), (12, "1/2")):
        path = encode_clip(tmp_path / f"slow.{suffix}", range(count), codec=codec, fps=fps)
        clip = load_clip(path, "uniform", **HERE)
        assert read_numbers(clip.frames) == list(range(count))
    assert "cut short" in reason(load_clip, cut(path, tmp_path / f"cut.{suffix}", 0.6), **HERE)


READ_IN_THREADS = """
import sys, threading, time
import capkit

def read_all(paths, end):
    while time.monotonic() < end:
        for path in paths:
            try:
                capkit.load_clip(path, "uniform", timeout_seconds=None)
            except capkit.VideoError:
                pass

threads = [threading.Thread(target=read_all, args=(sys.argv[1:], time.monotonic() + 4)) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_read_damaged_files_never_wait_for_each_other(clips, tmp_path):
    """A log callback that needs Python's lock would: FFmpeg closes a decoder under that lock, while it still logs."""
    paths = []
    for number, name in enumerate(["b-frames.mp4", "plain.mp4", "hevc.mp4"] * 4):
        data = bytearray(clips(name).read_bytes())
        rng = random.Random(number)
        for place in rng.sample(range(len(data) // 2), 20):
            data[place] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"{number}.mp4")
        paths[-1].write_bytes(data)
    subprocess.run([sys.executable, "-c", READ_IN_THREADS, *map(str, paths)], check=True, timeout=90)
