"""Features of frames are computed once, in memory and on disk, and captions are as without."""

import json
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

import capkit
from capkit import Decoding
from capkit.captioning import FrameFeatures, ground
from capkit.runs import DEMO_CLIPS

SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(scope="module")
def demo_clips():
    return [capkit.load_clip(path) for path in sorted(DEMO_CLIPS.glob("*.mp4"))[:2]]


@pytest.fixture(scope="module")
def plain():
    """A captioner that keeps no features."""
    captioner = capkit.load_captioner("demo")
    captioner.model.model.frame_features = None
    return captioner


def load(tmp_path, **settings):
    captioner = capkit.load_captioner("demo", features_dir=tmp_path)
    for name, value in settings.items():
        setattr(captioner.model.model.frame_features, name, value)
    return captioner, captioner.model.model.frame_features


def counts(features):
    return features.num_encoded, features.num_from_memory, features.num_from_disk


def num_different(*clips):
    """Number of frames that differ from all others."""
    return len({frame.tobytes() for clip in clips for frame in clip.frames})


def test_all_ways_to_caption_share_features_and_say_the_same(plain, demo_clips):
    captioner = capkit.load_captioner("demo")
    features, (first, second) = captioner.model.model.frame_features, demo_clips
    assert captioner.caption(first, decoding=SHORT).token_ids == plain.caption(first, decoding=SHORT).token_ids
    assert features.num_encoded == num_different(first)
    both = [caption.token_ids for caption in captioner.caption_batch(demo_clips, "How many?", SHORT)]
    assert both == [plain.caption(clip, "How many?", SHORT).token_ids for clip in demo_clips]
    num_encoded = num_different(first, second)
    assert features.num_encoded == num_encoded
    stream = captioner.stream(second, decoding=SHORT)
    assert "".join(stream) == plain.caption(second, decoding=SHORT).text
    beams = Decoding(max_new_tokens=4, num_beams=2)
    assert captioner.caption(first, "How many?", beams).text == plain.caption(first, "How many?", beams).text
    score = captioner.score(second, stream.caption).logprobs
    assert score == pytest.approx(plain.score(second, stream.caption).logprobs, abs=1e-4)
    settings = {"prompts": ["How many?", "What happens?"], "decodings": [SHORT]}
    for line in capkit.run_sweep(captioner, [first], **settings).records:
        assert line["text"] == plain.caption(first, line["prompt"], SHORT).text
    assert features.num_encoded == num_encoded
    ground(captioner, second, stream.caption)
    assert features.num_encoded == num_encoded + 1  # a grey one


def test_other_samplings_and_windows_need_only_their_own_frames(tmp_path):
    path = sorted(DEMO_CLIPS.glob("*.mp4"))[0]
    captioner, features = load(tmp_path)
    clips = [capkit.load_clip(path, "chat"), capkit.load_clip(path, "uniform"), capkit.load_clip(path, "chat", 2.0)]
    for number in range(1, 4):
        captioner.caption(clips[number - 1], decoding=SHORT)
        assert features.num_encoded == num_different(*clips[:number])
    assert features.num_encoded < sum(map(len, clips))


READ = """
import json, sys
import capkit
captioner = capkit.load_captioner("demo", features_dir=sys.argv[1])
captions = [captioner.caption(capkit.load_clip(path), "What happens?", {"max_new_tokens": 8}) for path in sys.argv[2:]]
features = captioner.model.model.frame_features
print(json.dumps([[caption.token_ids for caption in captions], features.num_encoded, features.num_from_disk]))
"""


def test_another_process_reads_them_from_disk(tmp_path, plain, demo_clips):
    captioner, _ = load(tmp_path)
    captioner.caption_batch(demo_clips, decoding=SHORT)
    paths = [clip.info.path for clip in demo_clips]
    done = subprocess.run([sys.executable, "-c", READ, tmp_path, *paths], check=True, capture_output=True, text=True)
    tokens, num_encoded, num_from_disk = json.loads(done.stdout)
    assert tokens == [plain.caption(clip, "What happens?", SHORT).token_ids for clip in demo_clips]
    assert (num_encoded, num_from_disk) == (0, num_different(*demo_clips))


@pytest.mark.parametrize("kind", ["cut", "bit", "text", "empty", "other tensor"])
def test_damaged_files_count_as_missing_and_are_mended(tmp_path, plain, demo_clips, kind):
    from safetensors.torch import save

    captioner, features = load(tmp_path)
    captioner.caption(demo_clips[0], decoding=SHORT)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == features.num_encoded
    for path in files[::2]:
        content = path.read_bytes()
        damaged = {
            "cut": content[:-100],
            "bit": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
            "text": b"no tensors",
            "empty": b"",
            "other tensor": save({"features": torch.zeros(3)}),
        }[kind]
        path.write_bytes(damaged)
    for num_damaged in (len(files[::2]), 0):
        again, features = load(tmp_path)
        caption = again.caption(demo_clips[0], decoding=SHORT)
        assert caption.token_ids == plain.caption(demo_clips[0], decoding=SHORT).token_ids
        assert counts(features) == (num_damaged, 0, len(files) - num_damaged)


def test_memory_and_disk_are_bounded(tmp_path):
    tower = torch.nn.Linear(4, 4)
    frames = torch.arange(20.0).view(20, 1, 1, 1)

    def encode(pixels):
        return pixels.expand(-1, 1, 5, 25).flatten(2) * 2  # 500 bytes a frame

    features = FrameFeatures(tower, tmp_path, "a", memory_bytes=2000, disk_bytes=4000)
    with torch.no_grad():
        for frame in frames:
            assert torch.equal(features(frame[None], encode), encode(frame[None]))
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 4000
        features(frames[-4:], encode)
        assert counts(features) == (20, 4, 0)  # the latest are in memory
        latest_file = FrameFeatures(tower, tmp_path, "a", memory_bytes=0)
        assert torch.equal(latest_file(frames[-4:], encode), encode(frames[-4:]))
        assert counts(latest_file)[2] == 4
        other_model = FrameFeatures(tower, tmp_path, "b")
        other_model(frames[-4:], encode)
        assert counts(other_model) == (4, 0, 0)


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, plain, demo_clips):
    (tmp_path / "file").write_text("")
    captioner, _ = load(tmp_path / "file" / "features")
    with pytest.warns(UserWarning, match="features are kept in memory only: .*file"):
        caption = captioner.caption(demo_clips[0], decoding=SHORT)
    assert caption.token_ids == plain.caption(demo_clips[0], decoding=SHORT).token_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captioner.caption(demo_clips[1], decoding=SHORT)


def test_changed_weights_are_never_mixed_with_kept_features(tmp_path, demo_clips):
    captioner, features = load(tmp_path)
    before = captioner.score(demo_clips[0], "A red ball.").logprobs
    weight = captioner.model.model.vision.linear_proj.linear_proj.weight
    with torch.no_grad():
        weight.mul_(-1)
    after = captioner.score(demo_clips[0], "A red ball.").logprobs
    assert np.abs(np.subtract(before, after)).max() > 0.1
    num_files = len(list(tmp_path.rglob("*.safetensors")))
    captioner.caption(demo_clips[1], decoding=SHORT)
    assert len(list(tmp_path.rglob("*.safetensors"))) == num_files


def test_threads_share_them(tmp_path, plain, demo_clips):
    captioner, features = load(tmp_path, memory_bytes=300_000)
    results = {}

    def caption(number):
        clip = demo_clips[number % 2]
        results[number] = captioner.caption(clip, "What happens?", SHORT).token_ids

    threads = [threading.Thread(target=caption, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    right = [plain.caption(clip, "What happens?", SHORT).token_ids for clip in demo_clips]
    assert results == {number: right[number % 2] for number in range(4)}


def test_gradients_go_through_the_tower(demo_clips):
    captioner = capkit.load_captioner("demo")
    inputs = captioner.processor(demo_clips[:1], "What happens?")
    captioner.model(**inputs, logits_to_keep=1).logits.sum().backward()
    assert captioner.model.model.vision.boi.grad is not None
    assert captioner.model.model.frame_features.num_encoded == 0


def test_they_lie_below_a_folder_of_the_model(tmp_path, demo_clips):
    captioner, _ = load(tmp_path)
    captioner.caption(demo_clips[0], decoding=SHORT)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"{captioner.fingerprint}-float32"
