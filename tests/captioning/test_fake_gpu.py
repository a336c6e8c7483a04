"""Every way to use a GPU, on a fake one: no CPU tensor meets a GPU tensor, and few things wait for it."""

import functools
import pkgutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from fake_gpu import DEVICE, NAME, FakeGpu, FakeGraph, MixedDevices, move_to_gpu
from paths import GOLDEN
from torch.nn import functional as F

import capkit
from capkit import Captioner, Clip, Decoding, Prompt
from capkit.captioning import FrameFeatures, SharedVideo, generate, ground
from capkit.captioning.graphs import DecodingStep

CLIPS = [
    Clip.from_frames(np.random.default_rng(count).integers(0, 256, (count, 40, 60, 3), dtype=np.uint8))
    for count in (3, 1, 4)
]
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 3}
PENALTIES = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
STEERING = {"forbidden_words": ["e", "in the", "("], "word_bias": {"zebra": 9, "in": -3.0}}


def load():
    """To be changed, unlike the captioner that all tests share."""
    return capkit.load_captioner(GOLDEN, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model():
    """A model on the fake GPU."""
    return move_to_gpu(load().model)


@pytest.fixture
def gpu(monkeypatch):
    """The fake GPU, in this thread and those of streams, with graphs."""
    made = FakeGpu()
    monkeypatch.setattr(torch.inference_mode, "__enter__", torch.no_grad.__enter__)
    monkeypatch.setattr(torch.inference_mode, "__exit__", torch.no_grad.__exit__)
    generate_into, init = generate._generate_into, DecodingStep.__init__

    def in_another_thread(*arguments):
        with FakeGpu(made.counts):
            generate_into(*arguments)

    def recorded(step, *args, **kwargs):
        init(step, *args, **kwargs)
        step._is_recorded = True

    monkeypatch.setattr(generate, "_generate_into", in_another_thread)
    monkeypatch.setattr(DecodingStep, "__init__", recorded)
    monkeypatch.setattr("capkit.captioning.graphs.STATIC_DEVICES", (NAME,))
    for name, stand_in in (("CUDAGraph", FakeGraph), ("graph", FakeGraph.record), ("device", lambda _: nullcontext())):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


# ---- ways to use a GPU: functions of a captioner and a number of new tokens; what they return is as on the CPU -------


def tokens(captions):
    captions = list(captions)
    return [caption.token_ids for caption in captions], [np.array(caption.logprobs) for caption in captions]


def caption(captioner, count, **settings):
    return tokens([captioner.caption(CLIPS[0], decoding=Decoding(count, **settings))])


def batch(captioner, count, **settings):
    return tokens(captioner.caption_batch(CLIPS, decoding=Decoding(count, **settings)))


def stream(captioner, count):
    stream = captioner.stream(CLIPS[0], decoding=Decoding(count))
    assert "".join(stream) == stream.caption.text
    return tokens([stream.caption])


def branches(captioner, count):
    decodings = Decoding(count), Decoding(count, **SAMPLING), Decoding(count, **PENALTIES)
    prompts = "What happens?", "Why is it so?", "Who?"
    return tokens(SharedVideo(captioner, CLIPS[0]).caption([(one, other) for one in prompts for other in decodings]))


def steered_branches(captioner, count):
    decodings = Decoding(count), Decoding(count, **STEERING), Decoding(count, **SAMPLING, **STEERING)
    prompts = Prompt("What happens?", answer_prefix="A zeb"), "Who?"
    return tokens(SharedVideo(captioner, CLIPS[0]).caption([(one, other) for one in prompts for other in decodings]))


def sweep(captioner, count):
    decodings = [{"max_new_tokens": count}, {"max_new_tokens": count, **SAMPLING}]
    records = capkit.run_sweep(captioner, CLIPS[:2], prompts=["What happens?", "Why?"], decodings=decodings).records
    return [record["text"] for record in records], [np.array(record["mean_logprob"]) for record in records]


def score(captioner, count):
    return [], [np.array(captioner.score(CLIPS[0], "A red ball. " * count).logprobs)]


def grounding(captioner, count):
    found = ground(captioner, CLIPS[0], ["A red star. " * count, "Blue."])
    return [one.tokens for one in found], [one.leaning for one in found] + [one.support for one in found]


def kept_features(captioner, count):
    """A clip that was captioned before, alone and beside others."""
    found = [caption(captioner, 1), batch(captioner, count)]
    assert captioner.model.model.frame_features.num_from_memory == len(CLIPS[0])
    return [ids for ids, _ in found], [one for _, logprobs in found for one in logprobs]


def frames_on_the_gpu(captioner, count):
    frames = torch.tensor(CLIPS[0].frames).to(captioner.model.device)
    return captioner.processor(frames, "Why?")["input_ids"].tolist(), [Clip.from_frames(frames).frames]


def plain_generate(captioner, count, **settings):
    model, processor = captioner.model, captioner.processor
    inputs = processor(CLIPS[:2], "Why?").to(model.device)
    return model.generate(**inputs, max_new_tokens=count, do_sample=False, **settings).tolist(), []


NOISY = SAMPLING | PENALTIES
# With graphs or without; then how often, at most, whatever the number of tokens, and for each of them: reads and copies
# that wait, and transfers that do not. What waits for every token without graphs is in transformers' generate().
WAYS = {
    "a caption": (caption, True, (7, 19, 0), (0, 0, 1)),
    "a batch": (batch, True, (19, 49, 0), (0, 0, 1)),
    "a noisy batch": (partial(batch, **NOISY), True, (19, 49, 0), (0, 0, 2)),
    "a steered batch": (partial(batch, **SAMPLING, **STEERING), True, (19, 49, 0), (0, 0, 3)),
    "a stream": (stream, True, (7, 19, 0), (0, 0, 1)),
    "branches": (branches, True, (4, 40, 0), (0, 0, 2)),
    "steered branches": (steered_branches, True, (4, 40, 0), (0, 0, 4)),
    "a sweep of two clips": (sweep, True, (8, 60, 0), (0, 0, 4)),
    "kept features": (kept_features, True, (25, 70, 1), (0, 0, 1)),
    "a caption without graphs": (caption, False, (11, 13, 0), (1, 0, 0)),
    "a batch without graphs": (batch, False, (27, 36, 0), (2, 0, 0)),
    "a noisy batch without graphs": (partial(batch, **NOISY), False, (27, 36, 0), (2, 0, 1)),
    "a steered batch without graphs": (partial(batch, **STEERING), False, (27, 36, 0), (3, 0, 1)),
    "a stream without graphs": (stream, False, (12, 13, 0), (2, 0, 0)),
    "branches without graphs": (branches, False, (4, 13, 0), (1, 2, 1)),
    "steered branches without graphs": (steered_branches, False, (4, 13, 0), (1, 2, 3)),
    "beam search": (partial(batch, num_beams=3, repetition_penalty=1.1), False, (23, 23, 0), (2, 0, 0)),
    "steered beam search": (partial(batch, num_beams=3, **STEERING), False, (23, 23, 0), (3, 0, 1)),
    "a score": (score, False, (5, 5, 0), (0, 0, 0)),
    "grounding": (grounding, False, (21, 36, 0), (0, 0, 0)),
    "frames on the GPU": (frames_on_the_gpu, False, (2, 1, 0), (0, 0, 0)),
    "generate()": (plain_generate, False, (12, 13, 0), (2, 0, 0)),
    "generate() with beams": (partial(plain_generate, num_beams=2), False, (16, 14, 0), (2, 0, 0)),
}
NUM_TOKENS = 7  # of which those from the third on are replayed


def run(way, model, processor):
    function, with_graphs, *_ = WAYS[way]
    model.model.frame_features = FrameFeatures(model.model.vision)
    captioner = Captioner(model, processor)
    graphs = captioner._graph_decoder
    graphs.is_useful &= with_graphs
    result = function(captioner, NUM_TOKENS)
    assert any(step._graph for step in graphs._steps.values()) == graphs.is_useful
    return result


@pytest.fixture(scope="module")
def expected():
    """What each way says on the CPU."""
    captioner = load()
    return functools.cache(lambda way: run(way, captioner.model, captioner.processor))


@pytest.fixture
def check_words(gpu, model, captioner, expected):
    def check(way):
        wanted, wanted_numbers = expected(way)
        with gpu:
            found, numbers = run(way, model, captioner.processor)
        assert found == wanted
        for one, other in zip(numbers, wanted_numbers, strict=True):
            assert one == pytest.approx(other, abs=1e-3)

    return check


def check_waits(gpu, way):
    most = [start + each * NUM_TOKENS for start, each in zip(*WAYS[way][2:], strict=True)]
    totals = [gpu.total(kind) for kind in ("read", "copy", "sent")]
    lines = "\n".join(f"{count} x {kind} at {line}" for (kind, line), count in gpu.counts.most_common())
    assert all(map(int.__le__, totals, most)), f"{totals}, at most {most}:\n{lines}"


@pytest.mark.parametrize("way", WAYS)
def test_says_what_the_cpu_says_and_waits_no_more_than_it_must(way, gpu, check_words):
    check_words(way)
    check_waits(gpu, way)


def test_rows_that_move_to_a_larger_cache_say_the_same(check_words, monkeypatch):
    monkeypatch.setattr("capkit.captioning.graphs.STATIC_POSITIONS", 4)
    monkeypatch.setattr("capkit.captioning.graphs.FIRST_TOKENS", 3)
    check_words("a noisy batch")


# ---- faults that are made on purpose are found -----------------------------------------------------------------------


def on_the_cpu(function):
    def faulty(*args, **kwargs):
        result = function(*args, **kwargs)
        return result.cpu() if isinstance(result, torch.Tensor) else (result[0].cpu(), *result[1:])

    return faulty


def looked_at(function):
    def faulty(*args, **kwargs):
        result = function(*args, **kwargs)
        assert not (result if isinstance(result, torch.Tensor) else result[0]).isnan().any()
        return result

    return faulty


@pytest.mark.parametrize(
    "way, function, fault",
    [
        ("a caption", "captioning.caches:image_mask", on_the_cpu),
        ("a caption", "captioning.graphs:_read_layer", looked_at),
        ("a batch", "captioning.choosing:RowChoosers.choose", on_the_cpu),
        ("a noisy batch", "captioning.choosing:_gumbel_noise", on_the_cpu),
        ("a stream", "captioning.choosing:RowChoosers.choose", looked_at),
        ("branches", "captioning.graphs:DecodingStep.__call__", looked_at),
        ("a sweep of two clips", "captioning.shared_prefix:encode_frames", on_the_cpu),
        ("kept features", "captioning.features:FrameFeatures.__call__", on_the_cpu),
        ("a caption without graphs", "captioning.choosing:Chooser.choose", looked_at),
        ("a batch without graphs", "captioning.caches:rotary_position_ids", on_the_cpu),
        ("a noisy batch without graphs", "captioning.choosing:_gumbel_noise", on_the_cpu),
        ("a stream without graphs", "captioning.generate:_StopWhen.__call__", on_the_cpu),
        ("branches without graphs", "captioning.shared_prefix:SharedRow.decode", looked_at),
        ("beam search", "captioning.generate:rotary_position_ids", on_the_cpu),
        ("a score", "cogvlm2.modeling:CogVLM2VideoModel.embed", on_the_cpu),
        ("grounding", "captioning.attribution:chosen_logprobs", looked_at),
        ("frames on the GPU", "video.clip:_to_array", lambda _: np.asarray),
        ("generate()", "cogvlm2.modeling:rotary_position_ids", on_the_cpu),
        ("generate() with beams", "cogvlm2.modeling:place_features", on_the_cpu),
    ],
)
def test_finds_faults(way, function, fault, gpu, check_words, monkeypatch):
    original = pkgutil.resolve_name(f"capkit.{function}")
    with pytest.raises((AssertionError, RuntimeError, UserWarning)):
        monkeypatch.setattr(f"capkit.{function}".replace(":", "."), fault(original))
        check_words(way)
        check_waits(gpu, way)


def test_the_fake_gpu_refuses_and_counts_what_cuda_would(gpu):
    with gpu:
        here, there = torch.ones(2, 3), torch.ones(2, 3, device=DEVICE)
        for refused in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: F.linear(there, here),
            lambda: F.scaled_dot_product_attention(there, there, there, attn_mask=here @ here.mT),
            lambda: here[there[0].long()],
        ):
            with pytest.raises(MixedDevices):
                refused()
        assert not gpu.counts
        allowed = {
            "read": [there.tolist, there.nonzero, lambda: there[there > 0], lambda: there.max().item(), there.cpu],
            "copy": [lambda: here.to(DEVICE), lambda: there.copy_(here), lambda: there[[0, 1]]],
            "sent": [lambda: there.to("cpu", non_blocking=True)],
        }
        for kind, functions in allowed.items():
            for count, function in enumerate(functions, 1):
                function()
                assert gpu.total(kind) == count
        assert gpu.total("read") + gpu.total("copy") + gpu.total("sent") == 9
        assert torch.equal((there + here[0, 0]).cpu(), here + 1)  # a single number may be anywhere
