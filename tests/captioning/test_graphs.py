"""Decoding as on a GPU: preallocated caches and a written-out step say what `generate()` says. Graphs need a GPU."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from paths import GOLDEN

import capkit
from capkit import Decoding, Prompt
from capkit.captioning import SharedVideo
from capkit.captioning.caches import prefill_batch
from capkit.captioning.choosing import RowChoosers
from capkit.captioning.graphs import DecodingStep, GraphDecoder, _read_layer

pytestmark = pytest.mark.golden  # on the oldest transformers too
SETTINGS = ({}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2})


def check_same(found, expected):
    assert [caption.token_ids for caption in found] == [caption.token_ids for caption in expected]
    assert [caption.finish_reason for caption in found] == [caption.finish_reason for caption in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("settings", SETTINGS)
def test_batches_say_what_each_clip_says_alone(captioner, random_clip, static, settings):
    decoding = Decoding(max_new_tokens=20, **settings)
    for seed, count in enumerate((3, 1, 4, 2)):  # what stood in a cache before is forgotten
        clips = [random_clip(1 + (seed + number) % 4, seed + number) for number in range(count)]
        found = static.caption_batch(clips, decoding=decoding)
        check_same(found, [captioner.caption(clip, decoding=decoding) for clip in clips])


def are_apart(captions, ends):
    """Whether captions with these end tokens all end, at three places or more, some late."""
    lengths = [next((at for at, token in enumerate(ids) if token in ends), None) for ids in captions]
    return None not in lengths and len(set(lengths)) > 2 and max(lengths) > 20


def test_rows_that_end_are_left_behind(captioner, random_clip, static, monkeypatch):
    """Those that go on move to larger caches; by default there is room for 2,048 tokens."""
    clips = [random_clip(1 + seed % 3, seed) for seed in range(5)]
    captions = [captioner.caption(clip, decoding=Decoding(max_new_tokens=60)).token_ids for clip in clips]
    tokens = sorted({token for ids in captions for token in ids})
    ends = next(list(pair) for pair in itertools.combinations(tokens, 2) if are_apart(captions, pair))
    monkeypatch.setattr(captioner.model.config, "eos_token_id", ends)
    sizes, step = [], GraphDecoder.step
    monkeypatch.setattr(GraphDecoder, "step", lambda self, *size: sizes.append(size) or step(self, *size))
    found = static.caption_batch(clips, decoding=Decoding())
    assert {caption.finish_reason for caption in found} == {"eos"}
    check_same(found, [captioner.caption(clip) for clip in clips])
    assert len({len(caption.token_ids) for caption in found}) > 2
    assert sizes[0][0] == 5 and sizes[-1][0] < 5 and len(sizes) > 3


def test_a_sweep_says_what_each_cell_says_alone(captioner, random_clip, static):
    decodings = [Decoding(max_new_tokens=5 + 4 * place, **settings) for place, settings in enumerate(SETTINGS)]
    clip, prompts = random_clip(4), ("What happens?", "Describe the video in one sentence, please.", "Who?")
    cells = [(Prompt(prompt), decoding) for prompt in prompts for decoding in decodings]
    video = SharedVideo(static, clip)
    for branches in (cells, cells[:1], cells[::-2]):
        found = list(video.caption(branches))
        check_same(found, [captioner.caption(clip, prompt, decoding=decoding) for prompt, decoding in branches])


def test_a_stream_shows_what_the_caption_holds(captioner, random_clip, static, monkeypatch):
    clip, decoding = random_clip(3), Decoding(max_new_tokens=30)
    stream = static.stream(clip, decoding=decoding)
    assert "".join(stream) == stream.caption.text
    check_same([stream.caption], [captioner.caption(clip, decoding=decoding)])
    with monkeypatch.context() as patch:
        patch.setattr(static.model.config, "eos_token_id", stream.caption.token_ids[2])
        ended = static.stream(clip, decoding=decoding)  # a further step is launched before the end is known
        assert "".join(ended) == ended.caption.text and ended.caption.finish_reason == "eos"
    stream = static.stream(clip, decoding=Decoding(max_new_tokens=2000))
    next(stream)
    stream.stop()
    assert stream.caption.finish_reason == "stopped"
    expected = captioner.caption(clip, decoding=Decoding(max_new_tokens=len(stream.caption.token_ids)))
    assert stream.caption.token_ids == expected.token_ids


def test_another_thread_does_not_wait_for_the_caches(captioner, random_clip, static):
    clip, decoding = random_clip(3), Decoding(max_new_tokens=6)
    expected = captioner.caption(clip, decoding=decoding).token_ids
    with static._graph_decoder.lock, ThreadPoolExecutor(1) as pool:
        assert pool.submit(static.caption, clip, decoding=decoding).result().token_ids == expected
    assert static._graph_decoder.num_bytes == 0
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(static.caption, clip, decoding=decoding) for _ in range(8)]
        assert [caption.result().token_ids for caption in found] == [expected] * 8
    assert static._graph_decoder.num_bytes > 0


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_step_is_the_models_own(captioner, random_clip, dtype, tolerance):
    """Logits of the next tokens, of rows of different length beside rows that are not used."""

    model = captioner.model
    if dtype != "float32":
        model = capkit.load_captioner(GOLDEN, device="cpu", dtype=dtype).model
    inputs = captioner.processor([random_clip(4, 1), random_clip(1, 2), random_clip(2, 3)], ["Why?", "Who is it?", "?"])
    tokens = torch.randint(300, (4, 3, 1), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        step, cache = DecodingStep(model, 4, 512), prefill_batch(model, inputs)
        for keys in step.keys:
            keys.fill_(float("nan"))  # nothing of what stood there before may be seen
        step.read(inputs)
        positions, mask, ids = step.positions[:3].clone(), inputs["attention_mask"], inputs["input_ids"][:, -1:]
        for new in [None, *tokens]:
            ids = ids if new is None else new
            step.ids[:3] = ids
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            found = step()[:3]
            assert found.dtype == torch.float32
            spread = float(expected.float().std())
            assert (found - expected[:, -1].float()).abs().max() < tolerance * spread
            positions, mask = positions + 1, torch.nn.functional.pad(mask, (0, 1), value=1)


def test_one_compilation_serves_all_layers(captioner, random_clip):
    captured = []

    def keep_graph(graph, inputs):
        captured.append(graph)
        return graph

    inputs = captioner.processor([random_clip(4, 1), random_clip(2, 2)], "Why?")
    with torch.inference_mode():
        steps = [DecodingStep(captioner.model, 2, 512) for _ in range(2)]
        for step in steps:
            step.read(inputs)
        steps[1]._read_layer = torch.compile(_read_layer, dynamic=False, fullgraph=True, backend=keep_graph)
        try:
            for _ in range(3):
                expected, found = (step() for step in steps)
                assert (found - expected).abs().max() < 1e-4 * float(expected.std())
        finally:
            torch.compiler.reset()
    assert len(captured) == 1


def test_where_compiling_fails_captions_come_all_the_same(captioner, random_clip, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("capkit.captioning.graphs._compiled_layer", lambda: fail)
    inputs = captioner.processor([random_clip(4, 1), random_clip(2, 2)], "Why?")
    with torch.inference_mode():
        steps = [DecodingStep(captioner.model, 2, 512, compile_after=2) for _ in range(2)]
        for step in steps:
            step.read(inputs)
        steps[1]._is_recorded = True
        monkeypatch.setattr(DecodingStep, "_record", lambda step: None)
        assert torch.equal(steps[0](), steps[1]())
        expected = steps[0]()
        with pytest.warns(UserWarning, match="not compiled, which is slower: .*no compiler"):
            assert torch.equal(steps[1](), expected)
        assert torch.equal(steps[0](), steps[1]())


def test_sizes_are_few_and_kept_within_the_budget(captioner, monkeypatch):
    monkeypatch.setattr("capkit.captioning.graphs.STATIC_DEVICES", ("cpu",))
    decoder = GraphDecoder(captioner.model)
    first = decoder.step(3, 700)
    assert (first.num_rows, first.num_positions) == (4, 1024)
    assert decoder.step(4, 1024) is first and decoder.step(4, 1025) is not first and decoder.step(3, 600) is first
    monkeypatch.setattr(GraphDecoder, "_most_bytes", decoder.num_bytes)
    decoder.step(1, 100)  # the one longest unused goes
    assert decoder.step(4, 700) is first and decoder.num_bytes <= decoder._most_bytes
    decoder.forget()
    assert decoder.num_bytes == 0 and decoder.step(4, 700) is not first
    monkeypatch.setattr("capkit.captioning.graphs.STATIC_DEVICES", ("cuda",))
    assert not GraphDecoder(captioner.model).is_useful


def test_rows_choose_as_each_would_alone(captioner):
    decodings = [
        Decoding(max_new_tokens=9, **settings) for settings in (*SETTINGS, *SETTINGS[1:], {"temperature": 1.0})
    ]
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    new_ids = torch.randint(50, (6, 4), generator=torch.Generator().manual_seed(2))
    together = RowChoosers(decodings, [7] * 6)
    for rows in ([0, 1, 2, 3, 4, 5], [5, 1], [2], [4, 0, 3]):
        chosen, logprobs = together.choose(new_ids[rows], scores[rows], 4, rows)
        for place, row in enumerate(rows):
            alone = RowChoosers([decodings[row]], [7]).choose(new_ids[[row]], scores[[row]], 4, [0])
            assert int(chosen[place]) == int(alone[0]) and float(logprobs[place]) == pytest.approx(float(alone[1]))


def test_memory_that_only_the_kept_caches_took_does_not_halve_later_batches(random_clip, static, monkeypatch):
    clips, sizes, few = [random_clip(2, seed) for seed in range(4)], [], Decoding(max_new_tokens=3)
    static.caption_batch(clips, decoding=few)
    assert static._graph_decoder.num_bytes
    request = static._request

    def make(batch, decoding):
        sizes.append(len(batch))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return request(batch, decoding)

    monkeypatch.setattr(static, "_request", make)
    for _ in range(2):
        static.caption_batch(clips, decoding=few)
    assert sizes == [4, 4, 4]
