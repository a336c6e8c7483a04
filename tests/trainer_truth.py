"""How trainers take frames out of a clip, written down a second time from the sources in `capkit.runs.trainers`."""

import math

import numpy as np


class Reader:
    """As decord's: a clip of n frames, of which frame i is the number i."""

    def __init__(self, num_frames, fps):
        self.num_frames, self.fps = num_frames, fps

    def __len__(self):
        return self.num_frames

    def get_avg_fps(self):
        return self.fps

    def get_batch(self, indices):
        indices = np.asarray(indices)
        if not len(indices):
            raise RuntimeError("no indices")
        if indices.min() < 0 or indices.max() >= self.num_frames:
            raise IndexError("out of range")
        return indices


def cogvideo(reader, num_frames):
    if len(reader) < num_frames:
        frames = reader.get_batch(list(range(len(reader))))
        return np.concatenate([frames, frames[-1:].repeat(num_frames - len(reader))])
    return reader.get_batch(list(range(0, len(reader), len(reader) // num_frames)))[:num_frames]


def diffusers(reader, num_frames):
    start, end = 0, len(reader)
    if end - start <= num_frames:
        frames = reader.get_batch(list(range(start, end)))
    else:
        frames = reader.get_batch(list(range(start, end, (end - start) // num_frames)))
    frames = frames[:num_frames]
    remainder = (3 + (len(frames) % 4)) % 4
    if remainder != 0:
        frames = frames[:-remainder]
    array = frames.reshape(-1, 1, 1, 1).squeeze(0) if len(frames) == 1 else frames.reshape(-1, 1, 1, 1)
    if array.ndim != 4:
        raise RuntimeError("a frame has lost its dimension")
    return frames


def cogvideox_factory(reader, num_frames):
    bucket = min([num_frames], key=lambda x: abs(x - min(len(reader), num_frames)))
    return reader.get_batch(list(range(0, len(reader), len(reader) // bucket)))[:bucket]


def finetrainers(reader, num_frames):
    import torch

    if len(reader) > num_frames:
        return reader.get_batch(torch.linspace(0, len(reader) - 1, num_frames).long().numpy())
    return reader.get_batch(range(len(reader)))


def sat(reader, max_num_frames, rate=8, skip=3.0):
    actual_fps, length = reader.get_avg_fps(), len(reader)
    start = int(skip)
    if length / actual_fps * rate > max_num_frames:
        num_frames = max_num_frames
        end = int(start + num_frames / rate * actual_fps)
        end_safty = min(int(start + num_frames / rate * actual_fps), int(length))
        indices = np.arange(start, end, (end - start) // num_frames).astype(int)
        frames = reader.get_batch(np.arange(start, end_safty))
        frames = frames[indices - start]
    elif length > max_num_frames:
        num_frames = max_num_frames
        end = int(length - skip)
        indices = np.arange(start, end, max((end - start) // num_frames, 1)).astype(int)
        frames = reader.get_batch(np.arange(start, end))[indices - start]
    else:
        count = int(length - skip) - start
        num_frames = count - 3 if count % 4 == 0 else count - count % 4 + 1
        frames = reader.get_batch(np.arange(start, int(start + num_frames)))
    return frames[:max_num_frames]


def videox_fun(reader, num_frames, stride=3):
    """The frames of each stretch that may be drawn."""
    count = min(num_frames, int(len(reader) * 1.0 // stride))
    if count == 0:
        raise ValueError("No Frames in video.")
    length = min(len(reader), (count - 1) * stride + 1)
    for start in range(len(reader) - length + 1):
        yield reader.get_batch(np.linspace(start, start + length - 1, count, dtype=int))


def first(reader, num_frames):
    """Of imageio and PyAV: the first frames, 4 k + 1 of a clip that is shorter than F."""
    count = min(len(reader), num_frames)
    while count > 1 and count % 4 != 1:
        count -= 1
    return reader.get_batch(range(count))


def ltx_2(reader, num_frames):
    if len(reader) < num_frames:
        raise ValueError("skipped")
    return reader.get_batch(range(len(reader)))[:num_frames]


def diffusion_pipe(reader, num_frames, framerate=16):
    import torch

    frames = int(len(reader) * framerate / reader.get_avg_fps())
    if frames < num_frames:
        raise ValueError("skipped: too short")
    return reader.get_batch(torch.linspace(0, len(reader) - 1, frames).to(torch.int32).numpy())[:num_frames]


def fastvideo(reader, num_frames, train_fps=16, tolerance=5):
    fps = reader.get_avg_fps()
    if len(reader) / fps > tolerance * (num_frames / train_fps):
        raise ValueError("too long")
    indices = np.arange(0, len(reader), fps / train_fps).astype(int)
    if len(indices) < num_frames:
        raise ValueError("too short, with drop_short_ratio 1")
    return reader.get_batch(indices[:num_frames] if len(indices) > num_frames else indices)


def ai_toolkit(reader, num_frames):
    last = len(reader) - 1
    interval = last / (num_frames - 1) if num_frames > 1 else 0
    return reader.get_batch([min(int(round(i * interval)), last) for i in range(num_frames)])


def simpletuner(reader, num_frames):
    frames = reader.get_batch(range(len(reader)))
    if len(frames) < num_frames:
        raise ValueError("below min_frames")
    return frames[:num_frames]


def onetrainer(reader, num_frames, target_frame_rate=24):
    """The frames of each stretch that may be drawn: offsets close enough to find each frame where one may begin."""
    rate = reader.get_avg_fps()
    left = (len(reader) - 1) / rate - (num_frames - 1) / target_frame_rate
    offsets = [left] if left <= 0 else [*np.arange(0.5, left * rate) / rate, left * (1 - 1e-9)]
    for offset in offsets:
        decoded = iter(range(len(reader)))
        while (frame := next(decoded, None)) is not None and (frame + 1) / rate <= offset:
            pass
        frames = []
        while len(frames) < num_frames:
            frame = next(decoded, None)
            frames.append(frames[-1] if frame is None else frame)
        yield reader.get_batch(frames)


def temporal_random_crop(reader, num_frames, size):
    """Of VideoTuna and Open-Sora: the frames of each stretch that may be drawn."""
    for begin in range(max(0, len(reader) - size - 1) + 1):
        end = min(begin + size, len(reader))
        assert end - begin >= num_frames
        yield reader.get_batch(np.linspace(begin, end - 1, num_frames, dtype=int))


def videotuna(reader, num_frames, stride=1):
    if len(reader) < num_frames * stride:
        raise ValueError("not enough frames")
    return temporal_random_crop(reader, num_frames, num_frames * stride)


def open_sora(reader, num_frames, rate=24.0):
    fps = round(reader.get_avg_fps(), 3)
    sampling_interval = 1 if fps < rate else math.ceil(fps / rate)
    count = len(reader) // sampling_interval
    bucket = 1 if count == 1 else next((t for t in range(129, 4, -4) if t <= num_frames and t <= count), None)
    if bucket is None:
        raise ValueError("no bucket")
    return temporal_random_crop(reader, bucket, bucket * sampling_interval)


def of_all_stretches(loader):
    return lambda *arguments, **more: np.concatenate([*loader(*arguments, **more)])


LOADERS = {
    "cogvideo": cogvideo,
    "cogkit": cogvideo,
    "diffusers": diffusers,
    "cogvideox-factory": cogvideox_factory,
    "finetrainers": finetrainers,
    "sat": sat,
    "videox-fun": of_all_stretches(videox_fun),
    "diffsynth": first,
    "musubi": first,
    **{"ltx-2": ltx_2, "diffusion-pipe": diffusion_pipe, "fastvideo": fastvideo, "ai-toolkit": ai_toolkit},
    "simpletuner": simpletuner,
    "onetrainer": of_all_stretches(onetrainer),
    "videotuna": of_all_stretches(videotuna),
    "open-sora": of_all_stretches(open_sora),
}


def frames_taken(trainer, num_video_frames, fps, num_frames=49, **settings):
    """The positions that a trainer takes, each once, in order; [] where it stops or passes over the clip."""
    try:
        taken = LOADERS[trainer](Reader(num_video_frames, fps), num_frames, **settings)
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError):
        return []
    return sorted({*taken.tolist()})
