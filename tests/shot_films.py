"""Films put together from random shots, of which a test knows the cuts: pans, zooms, shaking, fast things, flashes."""

from fractions import Fraction

import numpy as np
from PIL import Image
from video_factory import encode_clip

SIZES = [(144, 256), (108, 192), (192, 108), (120, 160)]
RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(50)]
CODECS = [
    {"codec": "libx264", "options": {"crf": "20", "preset": "veryfast"}},
    {"codec": "libx264", "options": {"crf": "36", "preset": "veryfast"}},  # blocky
    {"codec": "mpeg4"},
]
MARGIN = 2  # a shot's picture is this many times as large as the frame, so that there is something to pan over
FLASHES = (1, 2, 3)  # frames


class Shot:
    """Frames of one camera setting: a picture like a photograph's in its spectrum, in which something moves."""

    def __init__(self, rng, num_frames, size):
        self.num_frames, self.size = num_frames, size
        self.picture = _picture(rng, size[0] * MARGIN, size[1] * MARGIN)
        self.motion = rng.choice(["still", "pan", "fast pan", "zoom", "shake", "things", "fast things", "flicker"])
        self.grain = rng.choice([0, 3, 6])
        self.seed = int(rng.integers(1 << 30))
        self.direction = rng.uniform(-1, 1, 2)
        self.things = [(_picture(rng, *(rng.integers(20, size[0] // 2, 2))), rng.uniform(0, 1, 4)) for _ in range(3)]
        at = int(rng.integers(12, max(num_frames - 12, 13)))
        has_flash = num_frames > 40 and rng.random() < 0.25
        self.flash = range(at, at + int(rng.choice(FLASHES))) if has_flash else range(0)

    def draw(self, number):
        """uint8 (height, width, 3)"""
        height, width = self.size
        rng = np.random.default_rng([self.seed, number])
        if self.motion == "fast pan":  # a frame's width in half a second, blurred as by a shutter
            pixels = np.mean([self._part(number + part, width / 12) for part in (0, 0.15, 0.3, 0.45)], axis=0)
        else:
            pixels = self._part(number, width / 100 if self.motion == "pan" else 0, shake=rng.normal(0, 0.015, 2))
        if self.motion == "zoom":
            inner = 1 - 0.4 * number / self.num_frames
            box = (width * (1 - inner) / 2, height * (1 - inner) / 2, width * (1 + inner) / 2, height * (1 + inner) / 2)
            pixels = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((width, height), box=box), np.float32)
        if "things" in self.motion:
            pixels = pixels.copy()
            for thing, (y, x, vertical, horizontal) in self.things:
                speed = 0.06 if self.motion == "fast things" else 0.01  # of the frame, in a frame
                top = int(((y + (vertical - 0.5) * speed * number) % 1.5 - 0.5) * height)  # in and out at the edges
                left = int(((x + (horizontal - 0.5) * speed * number) % 1.5 - 0.5) * width)
                inside = thing[max(-top, 0) : height - top, max(-left, 0) : width - left]
                pixels[max(top, 0) :, max(left, 0) :][: inside.shape[0], : inside.shape[1]] = inside
        if self.motion == "flicker":
            pixels = pixels * rng.uniform(0.93, 1.07)
        if number in self.flash:
            pixels = pixels * 0.2 + 220
        pixels = pixels + rng.normal(0, self.grain, pixels.shape[:2])[:, :, None]
        return np.clip(pixels, 0, 255).astype(np.uint8)

    def _part(self, number, step, shake=(0, 0)):
        """What the camera sees of the picture, after so many frames with so many pixels each."""
        height, width = self.size
        reach = np.array([height, width]) * (MARGIN - 1)
        offset = reach / 2 + self.direction * step * number
        if self.motion == "shake":
            offset = offset + np.array(shake) * height
        y, x = (reach - np.abs(offset % (2 * reach) - reach)).astype(int)  # there and back
        return self.picture[y : y + height, x : x + width].astype(np.float32)


def _picture(rng, height, width):
    """A random picture: patches in every size, the larger the stronger, in the colours of a mood."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = np.inf
    waves = rng.normal(size=(3, *frequencies.shape)) + 1j * rng.normal(size=(3, *frequencies.shape))
    layers = np.fft.irfft2(waves / frequencies**1.3, (height, width))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    brightness, colour = layers[0], layers[1:]
    mood, contrast = rng.uniform(50, 190, 3), rng.uniform(20, 50)
    pixels = mood + contrast * brightness[..., None] + 15 * np.stack([colour[0], -colour[0] / 2, colour[1]], -1)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def make_film(path, seed):
    """Write the film of this seed; returns the indices of the first frames of its second and later shots."""
    rng = np.random.default_rng(seed)
    size, fps = SIZES[rng.integers(len(SIZES))], RATES[rng.integers(len(RATES))]
    lengths = [int(fps * seconds) for seconds in rng.choice([0.7, 1.0, 1.7, 3.0], int(rng.integers(1, 9)))]
    shots = [Shot(rng, length, size) for length in lengths]
    frames = [(shot, number) for shot in shots for number in range(shot.num_frames)]
    is_uneven = rng.random() < 0.2
    times = np.arange(len(frames)) * 1000 / float(fps)
    if is_uneven:
        times = np.cumsum(rng.choice([20, 33, 40, 80], len(frames)))
    settings = dict(CODECS[rng.integers(len(CODECS))], fps=fps, size=size)
    settings |= {"milliseconds": times.tolist()} if is_uneven else {}
    encode_clip(path, range(len(frames)), draw=lambda index, *_: frames[index][0].draw(frames[index][1]), **settings)
    return np.cumsum(lengths)[:-1].tolist()
