"""On a CUDA GPU: what capkit says there is what it says on the CPU, to the token in float32.

`make gpu` runs these and writes what they find to `notebooks/results/`. No video library and no notebook is needed.
"""

import contextlib
import gc
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import GOLDEN

import capkit
from capkit import Clip, Decoding, Prompt
from capkit.captioning import SharedVideo, attend, ground

pytestmark = pytest.mark.needs_cuda
DEVICE = os.environ.get("CAPKIT_TEST_DEVICE", "cuda")  # "cpu" to try the tests themselves
PROMPTS = ("Please describe this video in detail.", "What happens?", "Describe it in one sentence.")
SETTINGS = ({}, {"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2})
STATIC_BATCHES = 3  # of one size, of which the later ones are decoded with the graph of the first


# ---- what is found goes to a file, so that a run that is cut short loses nothing -------------------------------------


@pytest.fixture(scope="session")
def results():
    """Of all tests. `CAPKIT_RESULTS` is the folder for the file; without it nothing is written."""
    from capkit.benchmark.measuring import describe_machine

    found = {"machine": describe_machine(torch.device(DEVICE)), "tests": {}}
    folder = os.environ.get("CAPKIT_RESULTS")
    slug = re.sub(r"[^a-z0-9]+", "_", (found["machine"]["gpu"] or "cpu").lower()).strip("_")
    return found, Path(folder) / f"{slug}_tests.json" if folder else None


@pytest.fixture(autouse=True)
def findings(request, results, capsys):
    """A dictionary for what a test measures."""
    found, started = {}, time.perf_counter()
    yield found
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    outcome = "failed" if request.node.failed else "passed"
    everything, path = results
    everything["tests"][request.node.name] = {"outcome": outcome, "seconds": round(time.perf_counter() - started, 2)}
    everything["tests"][request.node.name] |= found
    with capsys.disabled():
        print(f"\n  {request.node.name}: {outcome} in {time.perf_counter() - started:.1f} s {found or ''}", flush=True)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def gpu():
    return capkit.load_captioner(GOLDEN, device=DEVICE, dtype="float32")


@pytest.fixture
def fresh(gpu):
    """The same model, with nothing compiled for it yet."""
    return capkit.Captioner(gpu.model, gpu.processor)


@pytest.fixture
def graphs(monkeypatch):
    """How many CUDA graphs are recorded and replayed."""
    counted = {"recorded": 0, "replayed": 0}

    def count(name, method):
        def counting(self, *args, **kwargs):
            counted[name] += 1
            return method(self, *args, **kwargs)

        return counting

    graph = torch.cuda.CUDAGraph
    monkeypatch.setattr(graph, "capture_begin", count("recorded", graph.capture_begin))
    monkeypatch.setattr(graph, "replay", count("replayed", graph.replay))
    return counted


def tokens(captions):
    return [caption.token_ids for caption in captions]


# ---- the original's numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_golden_tokens_in_float32(gpu, golden_cases, index, findings, monkeypatch):
    case = golden_cases[index]
    inputs = gpu.processor(case.frames, case.query, **case.settings).to(DEVICE)
    expected, model = case.greedy.flatten().tolist(), gpu.model
    monkeypatch.setattr(model.model, "frame_features", None)  # else the second time takes the features of the first
    for allowed in (True, False):  # TF32 in convolutions, torch's default, and without it
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        with torch.inference_mode():
            features = model.model.get_video_features(inputs["pixel_values_videos"]).cpu().numpy()
            logits = model(**inputs).logits.cpu().numpy().reshape(case.logits.shape)
        difference = np.abs(features - case.vision_features).max(), np.abs(logits - case.logits).max()
        findings[f"features and logits differ by, TF32 {allowed}"] = [float(one) for one in difference]
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert ids[0, inputs["input_ids"].shape[1] :].tolist() == expected
        caption = caption_case(gpu, case)
        assert (caption.token_ids, caption.text) == (expected, case.greedy_text)
    assert difference[0] < 1e-4 and difference[1] < 1e-3


def prompt_of(case):
    return Prompt(case.query, case.template, case.history)


def caption_case(captioner, case):
    return captioner.caption(Clip.from_frames(case.frames), prompt_of(case), Decoding(max_new_tokens=24))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_differs_only_at_near_ties(gpu, golden_cases, dtype, findings):
    """Where a token differs, the two were nearer to each other in float32 than half precision errs."""
    half = capkit.load_captioner(GOLDEN, device=DEVICE, dtype=dtype)
    for number, case in enumerate(golden_cases):
        expected = case.greedy.flatten().tolist()
        exact, rough = (forced_logits(one, case, expected) for one in (gpu, half))
        found = caption_case(half, case).token_ids
        error = float((exact - rough).abs().max())
        step = next((at for at, pair in enumerate(zip(found, expected, strict=True)) if len(set(pair)) > 1), None)
        findings[f"case {number}"] = {"largest_error": error, "first_difference": step}
        if step is not None:
            margin = float(exact[step, expected[step]] - exact[step, found[step]])
            findings[f"case {number}"]["margin"] = margin
            assert 0 <= margin < 4 * error
        assert error < 2  # logits spread over tens


@torch.inference_mode()
def forced_logits(captioner, case, new_ids):
    """Logits (T, V) before each of the new tokens, float32 on the CPU."""
    inputs = captioner.processor(case.frames, case.query, **case.settings).to(DEVICE)
    ids = torch.cat([inputs["input_ids"], torch.tensor([new_ids[:-1]], device=DEVICE)], 1)
    logits = captioner.model(input_ids=ids, pixel_values_videos=inputs["pixel_values_videos"]).logits
    return logits[0, -len(new_ids) :].float().cpu()


# ---- static caches and CUDA graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_batches_say_what_each_clip_says_on_the_cpu(fresh, captioner, random_clip, settings, findings, graphs):
    """Again and again with the same size, so that the last ones are decoded from a static cache."""
    decoding = Decoding(max_new_tokens=12, **settings)
    findings["graphs"] = []
    for seed in range(STATIC_BATCHES):
        clips = [random_clip(1 + (seed + number) % 4, 10 * seed + number) for number in range(3)]
        found = fresh.caption_batch(clips, decoding=decoding)
        expected = [captioner.caption(clip, decoding=decoding) for clip in clips]
        assert tokens(found) == tokens(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=5e-3)
        findings["graphs"].append(dict(graphs))
    assert DEVICE == "cpu" or graphs["replayed"] > 0


def test_a_size_is_recorded_once(fresh, random_clip, findings, graphs):
    findings["graphs"] = []
    for seed in range(STATIC_BATCHES + 4):
        fresh.caption_batch([random_clip(3, seed), random_clip(2, seed)], decoding=Decoding(max_new_tokens=12))
        findings["graphs"].append(dict(graphs))
    assert findings["graphs"][-1]["recorded"] == findings["graphs"][0]["recorded"]
    replays = findings["graphs"][-1]["replayed"] - findings["graphs"][-2]["replayed"]
    assert DEVICE == "cpu" or replays == 12


def test_two_sizes_in_turns_are_recorded_once_each(fresh, captioner, random_clip, findings, graphs):
    findings["graphs"] = []
    clips = [[random_clip(3, 1)], [random_clip(3, 1), random_clip(2, 2), random_clip(2, 3)]]
    expected = [[captioner.caption(one, decoding=Decoding(max_new_tokens=12)) for one in some] for some in clips]
    for turn in range(2 * STATIC_BATCHES):
        found = fresh.caption_batch(clips[turn % 2], decoding=Decoding(max_new_tokens=12))
        assert tokens(found) == tokens(expected[turn % 2])
        findings["graphs"].append(graphs["recorded"])
    assert findings["graphs"][-1] == findings["graphs"][1]


def test_a_step_that_goes_on_is_compiled(fresh, captioner, random_clip, findings, graphs):
    fresh._graph_decoder.compile_after = 4
    clips, decoding = [random_clip(3, 1), random_clip(2, 2)], Decoding(max_new_tokens=12)
    expected = [captioner.caption(clip, decoding=decoding) for clip in clips]
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        assert tokens(fresh.caption_batch(clips, decoding=decoding)) == tokens(expected)
    findings |= graphs | {"compiled": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)}
    assert DEVICE == "cpu" or (findings["compiled"], findings["recorded"]) == (1, 2)


def test_the_default_decoding_is_served_by_graphs(fresh, golden_cases, monkeypatch, findings, graphs):
    """Room for 2,048 new tokens, of which a caption takes few."""
    case, expected = golden_cases[0], golden_cases[0].greedy.flatten().tolist()
    monkeypatch.setattr(fresh.model.config, "eos_token_id", expected[20])
    for _ in range(STATIC_BATCHES):
        before, started = graphs["replayed"], time.perf_counter()
        caption = fresh.caption(Clip.from_frames(case.frames), prompt_of(case))
        findings["tokens_per_second"] = len(caption.token_ids) / (time.perf_counter() - started)
        assert caption.token_ids == expected[: expected.index(expected[20]) + 1]
    findings |= {"num_tokens": len(caption.token_ids), "replays": graphs["replayed"] - before}
    assert DEVICE == "cpu" or findings["replays"] > 0


# ---- threads and streams ---------------------------------------------------------------------------------------------


def test_any_thread_may_caption(fresh, golden_cases, findings, graphs):
    """One alone, and four at the same time, while and after the main thread has its graphs."""
    expected = [case.greedy.flatten().tolist() for case in golden_cases]
    for _ in range(STATIC_BATCHES):
        assert caption_case(fresh, golden_cases[0]).token_ids == expected[0]
    with ThreadPoolExecutor(1) as pool:
        before = graphs["replayed"]
        assert pool.submit(caption_case, fresh, golden_cases[0]).result().token_ids == expected[0]
        findings["replays in another thread"] = graphs["replayed"] - before
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(caption_case, fresh, case) for case in golden_cases * 3]
        mine = caption_case(fresh, golden_cases[0])
        assert [job.result().token_ids for job in jobs] == expected * 3 and mine.token_ids == expected[0]


def test_streams(fresh, golden_cases, findings, graphs):
    case = golden_cases[0]
    clip, expected = Clip.from_frames(case.frames), case.greedy.flatten().tolist()
    for _ in range(STATIC_BATCHES):
        stream = fresh.stream(clip, prompt_of(case), decoding=Decoding(max_new_tokens=24))
        assert "".join(stream) == stream.caption.text and stream.caption.token_ids == expected
    findings["replays"] = graphs["replayed"]
    stream = fresh.stream(clip, prompt_of(case), decoding=Decoding(max_new_tokens=2000))
    next(stream)
    stream.stop()
    assert stream.caption.finish_reason == "stopped" and len(stream.caption.token_ids) < 2000
    assert caption_case(fresh, case).token_ids == expected


# ---- sweeps and grounding --------------------------------------------------------------------------------------------


def test_sweeps_say_what_each_cell_says_on_the_cpu(fresh, captioner, random_clip, findings, graphs):
    """What `run_sweep` does with each clip; it needs pandas."""
    # After all tests above, log probabilities were 0.0086 apart on an H200; in a process of their own, or after the
    # tests of golden tokens, of half precision or of batches, 0.00003.
    findings["matmul precision"] = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    differences = []
    cells = [(prompt, Decoding(max_new_tokens=12, **settings)) for prompt in PROMPTS for settings in SETTINGS]
    for clip in (random_clip(4, 1), random_clip(2, 2)):
        for found, cell in zip(SharedVideo(fresh, clip).caption(cells), cells, strict=True):
            expected = captioner.caption(clip, *cell)
            assert found.token_ids == expected.token_ids
            differences.append(float(np.abs(np.subtract(found.logprobs, expected.logprobs)).max()))
    findings["log probabilities differ by"] = differences
    assert max(differences) < 5e-3
    assert DEVICE == "cpu" or graphs["replayed"] > 0


def test_scores_and_grounding_are_the_cpus(fresh, captioner, random_clip, findings):
    clip, texts = random_clip(4), ["A red star moves to the left.", "Blue."]
    for text in texts:
        pair = [np.array(one.score(clip, text).logprobs) for one in (fresh, captioner)]
        assert pair[0] == pytest.approx(pair[1], abs=5e-3)
    for one, other in zip(ground(fresh, clip, texts), ground(captioner, clip, texts), strict=True):
        findings["support differs by"] = float(np.abs(one.support - other.support).max())
        assert one.support == pytest.approx(other.support, abs=1e-2)
        assert one.leaning == pytest.approx(other.leaning, abs=1e-2)
    for looked, right in zip(attend(fresh, clip, texts), attend(captioner, clip, texts), strict=True):
        assert looked.patch_rows == pytest.approx(right.patch_rows, abs=1e-4)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A random model with prompts of 1,622 positions, in which a batch takes real memory."""
    from capkit.benchmark.models import SIZES, make_captioner, make_clip

    size = SIZES["small" if DEVICE == "cuda" else "tiny"]
    made = make_captioner(size, DEVICE, "float32")[1]
    yield made, [make_clip(size, seed) for seed in range(4)]
    gc.collect()


def test_long_prompts_say_what_generate_says(small, findings):
    """1,622 positions before the first new token, and more new ones than the first cache has room for."""
    made, clips, decoding = *small, Decoding(max_new_tokens=300)
    plain = capkit.Captioner(made.model, made.processor)
    plain._graph_decoder.is_useful = False
    expected, found = (one.caption_batch(clips[:3], decoding=decoding) for one in (plain, made))
    assert tokens(found) == tokens(expected)
    differences = [np.abs(np.subtract(*pair)).max() for pair in zip(*map(logprobs, (found, expected)), strict=True)]
    findings["log probabilities differ by"] = float(max(differences))
    assert max(differences) < 5e-3


def logprobs(captions):
    return [caption.logprobs for caption in captions]


def test_a_batch_that_does_not_fit_is_halved(small, findings):
    model, processor, clips = small[0].model, small[0].processor, small[1] * 8
    sizes, few = [], Decoding(max_new_tokens=6)

    def run(num_bytes):
        made = capkit.Captioner(model, processor)
        request = made._request
        made._request = lambda some, *args: sizes.append(len(some)) or request(some, *args)
        with limited_memory(num_bytes) as memory:
            captions = [tokens(made.caption_batch(clips, decoding=few)) for _ in range(2)]
        return captions, memory["peak"]

    expected, unlimited = run(None)
    found, limited = run(0.6 * unlimited)
    findings |= {"unlimited_mb": unlimited / 1e6, "limited_mb": limited / 1e6, "batches": sizes}
    assert found == expected and expected[0] == expected[1]
    assert DEVICE == "cpu" or (sizes[:3] == [32, 32, 32] and sizes.count(32) == 3 and limited < unlimited)


@contextlib.contextmanager
def limited_memory(num_bytes):
    """Inside, torch may take so many bytes more than before; None for all. Its dictionary gets the `peak` taken."""
    found = {"peak": 0}
    gc.collect()
    if DEVICE != "cuda":
        yield found
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    if num_bytes is not None:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
    try:
        yield found
        found["peak"] = torch.cuda.max_memory_allocated() - before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_that_runs_out_inside_a_layer_of_a_sweep(small, findings):
    """A layer asks for more than the GPU has: those before it hold the new positions then, the others do not."""
    made, clips = small
    branches = [(Prompt(prompt), Decoding(max_new_tokens=6)) for prompt in [*PROMPTS, "Who?", "Why?", "Where is it?"]]
    expected = tokens(SharedVideo(made, clips[0]).caption(branches))
    attention, refused = made.model.model.layers[1].self_attn, []

    def take_too_much(module, args, kwargs):
        num_positions = kwargs["hidden_states"].shape[1]
        if num_positions > 40:
            refused.append(num_positions)
            torch.empty(2**46, dtype=torch.uint8, device=DEVICE)

    video = SharedVideo(made, clips[0])
    assert tokens(video.caption(branches[:1])) == expected[:1]
    hook = attention.register_forward_pre_hook(take_too_much, with_kwargs=True)
    try:
        found = tokens(video.caption(branches))
    finally:
        hook.remove()
    findings["refused"] = refused
    assert refused and found == expected
    assert tokens(video.caption(branches)) == expected


def test_captions_leave_no_memory_behind(fresh, random_clip, findings):
    held = []
    for seed in range(STATIC_BATCHES + 6):
        fresh.caption_batch([random_clip(3, seed), random_clip(2, seed)], decoding=Decoding(max_new_tokens=6))
        gc.collect()
        held.append(torch.cuda.memory_allocated() if DEVICE == "cuda" else 0)
    findings["bytes"] = held
    assert held[-1] == held[-2] == held[-3]


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_loading_takes_the_gpu_and_bfloat16_by_itself(findings):
    made = capkit.load_captioner(GOLDEN, device="auto" if DEVICE == "cuda" else DEVICE)
    assert {weight.device.type for weight in made.model.parameters()} == {DEVICE}
    assert made.dtype == ("bfloat16" if DEVICE == "cuda" else "float32")
    with pytest.raises(ValueError, match="cuda:64"):
        capkit.load_captioner(GOLDEN, device="cuda:64")


def test_frames_may_be_on_the_gpu(gpu, random_clip):
    clip = random_clip(3)
    frames = torch.tensor(clip.frames, device=DEVICE)
    assert np.array_equal(Clip.from_frames(frames).frames, clip.frames)
    inputs, expected = (gpu.processor(one, "Why?")["pixel_values_videos"] for one in (frames, clip.frames))
    assert torch.equal(inputs.cpu(), expected.cpu())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised(quantization, random_clip, findings):
    pytest.importorskip("bitsandbytes")
    if DEVICE == "cpu":
        pytest.skip("quantization needs a GPU")
    made = capkit.load_captioner(GOLDEN, device=DEVICE, quantization=quantization)
    clip = random_clip(3)
    caption = made.caption(clip, decoding=Decoding(max_new_tokens=6))
    findings["text"] = caption.text
    assert len(caption.token_ids) == 6 and np.isfinite(caption.logprobs).all()
    totals = attend(made, clip, caption).patch_rows.sum((1, 2, 3))
    assert (totals > 0).all() and (totals < 1).all()
