"""What counts as a drawing of shapes: the demo model's clips, and those of other renderers; and what does not."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from matplotlib import cbook, patches
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import IdentityTransform
from PIL import Image

from capkit import load_clip
from capkit.demo.random_scenes import make_scene
from capkit.runs.clips import DEMO_CLIPS
from capkit.video import draw_strip, is_drawing, strip_frames
from capkit.video.seen import SeenFrames

CODECS = [
    ("libx264", {"crf": "23"}),
    ("libx264", {"crf": "40"}),
    ("libvpx-vp9", {"crf": "55", "b": "0", "cpu-used": "8", "deadline": "realtime"}),
    ("mpeg4", {"qmin": "20", "qmax": "31"}),
]
HEIGHT, WIDTH = 160, 208


def in_strip(frames):
    """Frames as the picture strip of a clip shows them."""
    return strip_frames(draw_strip(SeenFrames.of(frames, 112).finish(with_strip=False)[0]), len(frames))


def encoded(frames, codec, options):
    """Frames after an encoder, in a strip."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=Fraction(10), options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return in_strip(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))


def drawn(rng, background, num_frames=5):
    """Up to three plain shapes that move over a plain background, by matplotlib."""
    colours = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
    frames = []
    things = [
        (rng.integers(3), rng.choice(colours), rng.uniform(40, 120, 2), rng.uniform(15, 40), rng.uniform(-6, 6, 2))
        for _ in range(rng.integers(1, 4))
    ]
    for time in range(num_frames):
        figure = Figure((WIDTH / 100, HEIGHT / 100), dpi=100, facecolor=background)
        for kind, colour, start, radius, velocity in things:
            place = start + (24, 0) + velocity * time
            shape = [
                patches.Circle(place, radius),
                patches.Rectangle(place - radius, 2 * radius, 2 * radius, angle=5),
                patches.RegularPolygon(place, 3, radius=radius),
            ][kind]
            shape.set(facecolor=colour, edgecolor="none", transform=IdentityTransform())
            figure.add_artist(shape)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3])
    return np.stack(frames)


def fractal(rng, power, height=HEIGHT, width=WIDTH):
    """Noise with the spectrum of natural pictures, (height, width), of mean 0 and variance 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.ifft2((rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**power)
    return (noise.real - noise.real.mean()) / noise.real.std()


def moving(picture, num_frames=5):
    """A camera that pans over a picture (H, W, 3) of any size."""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).resize((WIDTH + 40, HEIGHT + 40))
    wide = np.asarray(image)
    return np.stack([wide[3 * t : 3 * t + HEIGHT, 8 * t : 8 * t + WIDTH] for t in range(num_frames)])


def natural(rng, kind):
    if kind == "noise":
        return rng.integers(0, 256, (5, HEIGHT, WIDTH, 3), np.uint8)
    if kind == "gradient":
        first, second = rng.integers(0, 100, 3), rng.integers(156, 256, 3)
        slope = np.linspace(0, 1, WIDTH)[:, None] + rng.uniform(-1, 1) * np.linspace(0, 1, HEIGHT)[:, None, None]
        share = (slope - slope.min()) / np.ptp(slope)
        return moving(first + (second - first) * share)
    if kind == "landscape":
        sky = np.linspace(0, 1, HEIGHT)[:, None, None] * (60, 50, 20) + (100, 150, 220) + np.zeros((HEIGHT, WIDTH, 3))
        ground = np.array([90, 110, 60]) + 25 * fractal(rng, 1.2)[..., None]
        return moving(np.where(np.arange(HEIGHT)[:, None, None] < rng.uniform(0.3, 0.7) * HEIGHT, sky, ground))
    power = {"rough": 1.0, "natural": 1.6, "soft": 2.2}[kind]
    colours = np.stack([fractal(rng, power + 0.4) for _ in range(3)], axis=-1)
    light = rng.uniform(20, 50) * fractal(rng, power)[..., None]
    return moving(rng.uniform(60, 190, 3) + light + rng.uniform(5, 20) * colours)


@pytest.mark.parametrize("path", sorted(DEMO_CLIPS.glob("*.mp4")), ids=lambda path: path.stem)
def test_the_sample_clips(path):
    assert is_drawing(in_strip(load_clip(path).frames))


def test_clips_of_the_demo_model(num_clips=120):
    wrong = [
        seed for seed in range(num_clips) if not is_drawing(in_strip(make_scene(seed, held_out=True).sample().frames))
    ]
    assert not wrong


@pytest.mark.parametrize("codec, options", CODECS, ids=lambda value: str(value))
def test_shapes_of_another_renderer_on_any_colour(codec, options):
    backgrounds = ["black", "white", *np.random.default_rng(0).random((18, 3))]
    wrong = [
        background
        for number, background in enumerate(backgrounds)
        if not is_drawing(encoded(drawn(np.random.default_rng(number), background), codec, options))
    ]
    assert not wrong


@pytest.mark.parametrize("kind", ["noise", "gradient", "landscape", "rough", "natural", "soft"])
def test_what_looks_like_footage(kind):
    clips = [encoded(natural(np.random.default_rng(number), kind), *CODECS[number % 4]) for number in range(12)]
    assert not any(map(is_drawing, clips))


def test_a_photograph():
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = np.asarray(Image.open(file).convert("RGB"))
    assert not is_drawing(in_strip(moving(photograph)))


def test_frames_of_a_strip_are_those_that_were_drawn():
    colours = np.random.default_rng(0).integers(0, 256, (29, 3), np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (29, 56, 56, 3))
    shown = strip_frames(draw_strip(np.ascontiguousarray(frames)), 29)
    assert shown.shape == (29, 112, 112, 3)
    assert np.abs(shown[:, 20:-20, 20:-20].mean(axis=(1, 2)) - colours).max() < 6
