"""Captions: the original's tokens; the same in a batch; streams, scores, memory that runs out."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from paths import GOLDEN
from transformers.generation import TopPLogitsWarper

import capkit
from capkit import Decoding, Prompt
from capkit.captioning import Chooser, draw_key, ground
from capkit.captioning.choosing import _hash, _hash_on_cpu
from capkit.runs import DEMO_CLIPS

FEW = Decoding(max_new_tokens=16)
DEMO_CLIP = sorted(DEMO_CLIPS.glob("*.mp4"))[0]


@pytest.mark.golden
@pytest.mark.parametrize("index", range(4))
def test_golden_captions(captioner, golden_cases, index):
    case = golden_cases[index]
    decoding = Decoding.from_generate_kwargs(
        max_new_tokens=24, do_sample=False, top_k=1, top_p=0.1, temperature=0.1, pad_token_id=128002
    )
    caption = captioner.caption(
        capkit.Clip.from_frames(case.frames), Prompt(case.query, case.template, case.history), decoding
    )
    assert caption.token_ids == case.greedy.flatten().tolist()
    assert caption.text == case.greedy_text
    assert caption.finish_reason == "length"
    # The log probability of the first token, from the original's own logits.
    logits = torch.tensor(case.logits).reshape(-1, case.logits.shape[-1])[-1].double()
    assert caption.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[caption.token_ids[0]]), abs=1e-3)


@pytest.mark.parametrize("decoding", [FEW, Decoding(max_new_tokens=16, temperature=1.0, seed=5)])
def test_a_clip_read_for_the_model_has_the_full_ones_captions(captioner, decoding):
    full, seen = (capkit.load_clip(DEMO_CLIP, image_size=size) for size in (None, captioner.processor.image_size))
    caption = captioner.caption(seen, decoding=decoding)
    assert caption.token_ids == captioner.caption(full, decoding=decoding).token_ids
    assert captioner.score(seen, caption) == captioner.score(full, caption)
    other = capkit.load_clip(DEMO_CLIP, image_size=28)
    with pytest.raises(ValueError, match="was read with image_size=28; read it again, with image_size=56"):
        captioner.caption(other)


@pytest.mark.golden
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_batches_give_every_clip_its_own_caption(captioner, golden_cases, random_clip, batch_size):
    """Clips of 1 to 12 frames, of other sizes, with prompts of other lengths: the tokens of each alone."""
    case = golden_cases[0]
    clips = [random_clip(n, seed=n, height=30 + 7 * n) for n in (1, 12, 3)] + [capkit.Clip.from_frames(case.frames)]
    clips.append(random_clip(5))
    prompts = ["Why?", "What happens at second 3?", "Please tell me everything.", case.query, "Colour?"]
    together = captioner.caption_batch(clips, prompts, decoding=Decoding(max_new_tokens=24), batch_size=batch_size)
    for caption, clip, prompt in zip(together, clips, prompts, strict=True):
        alone = captioner.caption(clip, prompt, decoding=Decoding(max_new_tokens=24))
        assert (caption.token_ids, caption.text, caption.prompt) == (alone.token_ids, alone.text, Prompt(prompt))
        assert caption.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert together[3].token_ids == case.greedy.flatten().tolist()


def end_token_is_likely(captioner, clip):
    """The third greedy token's id; make it the end token and generation stops there."""
    return captioner.caption(clip, decoding=FEW).token_ids[2]


def test_rows_that_end_at_different_lengths(captioner, random_clip, monkeypatch):
    clips = [random_clip(2, seed) for seed in range(4)]
    monkeypatch.setattr(captioner.model.config, "eos_token_id", end_token_is_likely(captioner, clips[0]))
    together = captioner.caption_batch(clips, decoding=FEW)
    assert len(together[0].token_ids) <= 3 and together[0].finish_reason == "eos"
    assert together[0].token_ids[-1] == captioner.model.config.eos_token_id
    assert len(together[0].logprobs) == len(together[0].token_ids)
    assert [c.token_ids for c in together] == [captioner.caption(clip, decoding=FEW).token_ids for clip in clips]
    # A config.json may name several end tokens; the first to come ends the caption.
    monkeypatch.setattr(captioner.model.config, "eos_token_id", [captioner.model.config.eos_token_id, 0])
    assert captioner.caption(clips[0], decoding=FEW).token_ids == together[0].token_ids


class TestSampling:
    def test_a_seed_repeats_a_caption_and_another_changes_it(self, captioner, random_clip):
        def sample(seed):
            return captioner.caption(random_clip(), decoding=Decoding(max_new_tokens=16, temperature=1.0, seed=seed))

        assert sample(1).token_ids == sample(1).token_ids != sample(2).token_ids
        assert sample(None).token_ids == sample(0).token_ids

    def test_clips_do_not_share_their_luck(self, random_clip):
        """Else two seeds compared over many clips would differ more often than chance allows."""
        decoding, scores = Decoding(max_new_tokens=1, temperature=1.0, seed=3), torch.zeros(1, 1000)
        keys = [draw_key(random_clip(2, number)) for number in range(40)]
        chosen = [Chooser([decoding], [key]).choose(None, scores, 0)[0].item() for key in keys]
        assert len(set(chosen)) > 30 and 300 < np.mean(chosen) < 700
        assert keys[0] == draw_key(random_clip(2, 0))

    def test_a_row_does_not_depend_on_its_batch(self, captioner, random_clip):
        decoding = Decoding(max_new_tokens=16, temperature=0.9, top_p=0.8, top_k=40, min_p=0.01, seed=5)
        clips = [random_clip(n, n) for n in (1, 4, 2)]
        together = captioner.caption_batch(clips, decoding=decoding)
        assert [c.token_ids for c in together] == [captioner.caption(c, decoding=decoding).token_ids for c in clips]

    @pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
    def test_top_p_keeps_what_transformers_keeps_and_ties(self, top_p):
        (_, mask) = Chooser([Decoding(temperature=1.0, top_p=top_p)], [0]).warpers
        scores = 3 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
        scores[1, 10:] = -torch.inf  # as after top_k
        assert torch.equal(mask(None, scores), TopPLogitsWarper(top_p)(None, scores))
        tied = torch.tensor([[1.0, 2.0, 1.0, -9.0, 1.0]])  # 2 has 0.48 of the probability, each 1 has 0.18
        assert mask(None, tied).isfinite().tolist() == [[top_p > 0.48, True, top_p > 0.48, False, top_p > 0.48]]

    def test_the_hash_is_splitmix64_however_it_is_computed(self):
        def splitmix64(start, token):
            bits = (start + token * 0x9E3779B97F4A7C15) % 2**64
            bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
            return (bits ^ (bits >> 31)) >> 24

        starts = np.array([[0], [1], [2**63], [2**64 - 1], [12345678901234567890]], np.uint64)
        expected = np.array([[splitmix64(int(start), token) for token in range(50)] for (start,) in starts], np.float32)
        assert np.array_equal(_hash_on_cpu(starts, 50), expected)
        assert np.array_equal(_hash(starts, torch.zeros(5, 50)), expected)  # as on a GPU

    def test_a_sure_token_is_drawn_whatever_the_noise(self):
        """Of this token, the random number in [0, 1) rounds to 1 in float32, whose noise would be minus infinity."""
        step, token = 253, 106447
        scores = torch.full((1, 128256), -torch.inf)
        scores[0, token] = 20.0
        chooser = Chooser([Decoding(temperature=0.7)], [12345])
        assert chooser.choose(None, scores, step)[0].item() == token

    def test_draws_do_not_depend_on_the_length_asked_for(self, captioner, random_clip):
        short, long = (
            captioner.caption(random_clip(), decoding=Decoding(max_new_tokens=n, temperature=1.0)) for n in (5, 20)
        )
        assert long.token_ids[:5] == short.token_ids

    def test_frequencies_are_the_models_probabilities(self, captioner, random_clip):
        """First tokens of many seeds against softmax(logits / T), cut to the top 5."""
        clip, temperature, top_k, draws = random_clip(1, height=20, width=20), 0.5, 5, 1800
        logits = captioner.model(**captioner.processor(clip)).logits[0, -1].double()
        best = logits.topk(top_k)
        expected = (best.values / temperature).softmax(-1)
        settings = [Decoding(1, temperature, top_k=top_k, seed=seed) for seed in range(draws)]
        first = [captioner.caption(clip, decoding=decoding).token_ids[0] for decoding in settings]
        assert set(first) <= set(best.indices.tolist())
        counts = np.array([first.count(token) for token in best.indices.tolist()])
        chi_squared = ((counts - draws * expected.detach().numpy()) ** 2 / (draws * expected.detach().numpy())).sum()
        assert chi_squared < 18.5  # 0.1 % quantile for 4 degrees of freedom

    def test_reported_log_probabilities_are_the_models_own(self, captioner, random_clip):
        clip = random_clip()
        caption = captioner.caption(clip, decoding=Decoding(max_new_tokens=12, temperature=1.5, top_k=20, seed=3))
        assert captioner.score(clip, caption).logprobs == pytest.approx(caption.logprobs, abs=1e-4)


class TestPenalties:
    def test_no_repeat_ngram(self, captioner, random_clip):
        ids = captioner.caption(random_clip(), decoding=Decoding(max_new_tokens=40, no_repeat_ngram_size=2)).token_ids
        pairs = list(zip(ids, ids[1:], strict=False))
        assert len(set(pairs)) == len(pairs)

    def test_count_generated_tokens_only(self, captioner, random_clip):
        """The prompt holds the very token that greedy search would choose first; a penalty leaves it alone."""
        clip = random_clip()
        first = captioner.caption(clip, "Why?", decoding=Decoding(max_new_tokens=1))
        history = [(captioner.processor.decode(first.token_ids * 3), "x")]
        for prompt in (Prompt("Why?"), Prompt("Why?", history=history)):
            plain = captioner.caption(clip, prompt, Decoding(max_new_tokens=1))
            hard = Decoding(max_new_tokens=1, repetition_penalty=50.0)
            assert captioner.caption(clip, prompt, hard).token_ids == plain.token_ids

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_repetition_penalty_makes_repeats_rarer(self, captioner, random_clip, num_beams):
        clip = random_clip(2, seed=4)
        plain, penalised = (
            captioner.caption(clip, decoding=Decoding(max_new_tokens=40, num_beams=num_beams, repetition_penalty=p))
            for p in (1.0, 3.0)
        )
        assert len(set(penalised.token_ids)) > len(set(plain.token_ids))


class TestBeams:
    def test_beam_search_equals_transformers(self, captioner, random_clip):
        clip = random_clip(3, seed=8)
        inputs = captioner.processor(clip)
        ids = captioner.model.generate(**inputs, max_new_tokens=12, num_beams=4, do_sample=False)
        caption = captioner.caption(clip, decoding=Decoding(max_new_tokens=12, num_beams=4))
        assert caption.token_ids == ids[0, inputs["input_ids"].shape[1] :].tolist()
        greedy = captioner.caption(clip, decoding=Decoding(max_new_tokens=12))
        assert caption.token_ids != greedy.token_ids
        assert sum(caption.logprobs) >= sum(greedy.logprobs)

    def test_in_a_batch(self, captioner, random_clip):
        clips, decoding = [random_clip(n, n) for n in (1, 3)], Decoding(max_new_tokens=8, num_beams=3)
        for caption, clip in zip(captioner.caption_batch(clips, decoding=decoding), clips, strict=True):
            alone = captioner.caption(clip, decoding=decoding)
            assert caption.token_ids == alone.token_ids
            assert caption.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


class TestScore:
    def test_of_a_caption_is_what_generation_reported(self, captioner, golden_cases):
        case = golden_cases[3]
        clip = capkit.Clip.from_frames(case.frames)
        caption = captioner.caption(clip, Prompt(case.query, history=case.history), FEW)
        score = captioner.score(clip, caption)
        assert score.token_ids == caption.token_ids
        assert score.logprobs == pytest.approx(caption.logprobs, abs=1e-4)
        assert score.total_logprob == pytest.approx(sum(caption.logprobs), abs=1e-3)
        other = captioner.score(clip, caption, prompt="Why?")
        assert other.total_logprob < score.total_logprob
        assert other == captioner.score(clip, caption, Prompt("Why?", history=case.history))

    def test_the_end_token_counts_if_it_came(self, captioner, random_clip, monkeypatch):
        clip = random_clip()
        monkeypatch.setattr(captioner.model.config, "eos_token_id", end_token_is_likely(captioner, clip))
        caption = captioner.caption(clip, decoding=FEW)
        assert caption.finish_reason == "eos"
        assert captioner.score(clip, caption).token_ids[-1] == captioner.model.config.eos_token_id

    def test_of_a_text_is_tokenised_as_a_continuation(self, captioner, golden_cases, random_clip):
        score = captioner.score(random_clip(), "A quiet harbour.", "What is it?")
        processor, clip = captioner.processor, random_clip()
        with_answer = processor.prompt_ids(clip, Prompt("Q", history=[("What is it?", "A quiet harbour.")]))
        start = len(processor.prompt_ids(clip, Prompt("What is it?")))
        assert with_answer[start : start + len(score.token_ids)] == score.token_ids
        assert "".join(score.tokens) == " A quiet harbour."
        assert score.total_logprob == pytest.approx(score.mean_logprob * len(score.tokens))

    def test_is_the_models_probability(self, captioner, random_clip):
        """Against one forward pass a token, without padding, cache or slices."""
        clip, text = random_clip(2), " Blue."
        score, ids = captioner.score(clip, text, "Colour?"), captioner.processor.prompt_ids(clip, Prompt("Colour?"))
        pixels = captioner.processor(clip)["pixel_values_videos"]
        for token, logprob in zip(score.token_ids, score.logprobs, strict=True):
            logits = captioner.model(input_ids=torch.tensor([ids]), pixel_values_videos=pixels).logits[0, -1]
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token].detach()), abs=1e-4)
            ids = [*ids, token]

    @pytest.mark.parametrize("text", ["", "  \n", None, 5])
    def test_of_nothing(self, captioner, random_clip, text):
        with pytest.raises(ValueError, match="no text to score"):
            captioner.score(random_clip(), text)


class TestStream:
    @pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=40), Decoding(max_new_tokens=40, temperature=1.0)])
    def test_pieces_make_the_caption(self, captioner, random_clip, decoding):
        stream = captioner.stream(random_clip(), decoding=decoding)
        pieces = list(stream)
        assert len(pieces) > 5
        assert "".join(pieces) == stream.caption.text
        alone = captioner.caption(random_clip(), decoding=decoding)
        assert (stream.caption.token_ids, stream.caption.logprobs) == (alone.token_ids, alone.logprobs)
        assert list(stream) == []

    def test_long_captions_are_not_decoded_anew_for_each_piece(self, captioner, random_clip, monkeypatch):
        decode, lengths = captioner.processor.decode, []
        monkeypatch.setattr(
            captioner.processor, "decode", lambda ids, **kw: lengths.append(len(ids)) or decode(ids, **kw)
        )
        stream = captioner.stream(random_clip(), decoding=Decoding(max_new_tokens=200))
        text = "".join(stream)
        assert text == stream.caption.text == decode(stream.caption.token_ids, skip_special_tokens=True)
        assert sum(lengths) < 200 * 20  # all of them each time: 20,100

    def test_stop(self, captioner, random_clip):
        stream = captioner.stream(random_clip())
        for _, piece in zip(range(3), stream, strict=False):
            assert piece
        stream.stop()
        caption = stream.caption
        assert caption.finish_reason == "stopped"
        assert 3 <= len(caption.token_ids) < 2048 and len(caption.logprobs) == len(caption.token_ids)
        assert captioner.processor.decode(caption.token_ids, skip_special_tokens=True) == caption.text

    def test_a_stream_that_is_dropped_stops(self, captioner, random_clip):
        before = threading.active_count()
        stream = captioner.stream(random_clip())
        next(stream)
        thread = stream._thread
        del stream
        thread.join(20)
        assert not thread.is_alive() and threading.active_count() <= before

    def test_errors_reach_the_reader(self, captioner, random_clip, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("the GPU fell out")

        monkeypatch.setattr(captioner.model, "generate", fail)
        stream = captioner.stream(random_clip())
        with pytest.raises(RuntimeError, match="the GPU fell out"):
            list(stream)
        with pytest.raises(ValueError, match="must be one of"):
            captioner.stream(random_clip(), {"template": "poem"})
        with pytest.raises(ValueError, match="beam search"):
            captioner.stream(random_clip(), decoding=Decoding(num_beams=2))


class TestMemory:
    """generate() that cannot take more than so many rows, as a full GPU would refuse them."""

    @pytest.fixture
    def captioner(self, new_captioner):
        return new_captioner

    @pytest.fixture
    def cramped(self, captioner, monkeypatch):
        generate, seen = captioner.model.generate, []

        def cramped_generate(*args, **kwargs):
            seen.append(len(kwargs["input_ids"]))
            if seen[-1] > cramped_generate.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return generate(*args, **kwargs)

        cramped_generate.most, cramped_generate.seen = 2, seen
        monkeypatch.setattr(captioner.model, "generate", cramped_generate)
        return cramped_generate

    def test_the_batch_is_halved_and_goes_on(self, captioner, random_clip, cramped):
        clips = [random_clip(n % 3 + 1, n) for n in range(9)]
        captions = captioner.caption_batch(clips, decoding=FEW)
        assert cramped.seen == [9, 4, 2, 2, 2, 2, 1]
        assert [c.token_ids for c in captions] == [captioner.caption(c, decoding=FEW).token_ids for c in clips]

    def test_one_that_is_too_much_alone(self, captioner, random_clip, cramped):
        cramped.most = 0
        with pytest.raises(torch.OutOfMemoryError):
            captioner.caption_batch([random_clip()] * 3, decoding=FEW)
        assert cramped.seen == [3, 1]

    def test_other_errors_are_not_retried(self, captioner, random_clip, monkeypatch):
        calls = []

        def fail(*args, **kwargs):
            calls.append(1)
            raise RuntimeError("shape mismatch")

        monkeypatch.setattr(captioner.model, "generate", fail)
        with pytest.raises(RuntimeError, match="shape mismatch"):
            captioner.caption_batch([random_clip()] * 4)
        assert len(calls) == 1


def test_bad_arguments(captioner, random_clip):
    clip = random_clip()
    for call, message in (
        (lambda: captioner.caption(clip, {"template": "story"}), "must be one of 'chat', 'vqa', 'base'"),
        (lambda: captioner.caption(clip, ""), "not empty"),
        (lambda: captioner.caption_batch([clip, clip], ["a"]), "1 prompts for 2 clips"),
        (lambda: captioner.caption_batch([clip], batch_size=0), "batch_size=0"),
        (lambda: captioner.caption(clip, Prompt("a", "base", [("q", "a")])), "no effect"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
    assert captioner.caption_batch([]) == []


def test_what_is_no_clip_is_refused_with_how_to_make_one(captioner, random_clip):
    for wrong in ("clip.mp4", None, random_clip().frames):
        for call in (captioner.caption, captioner.stream, captioner.tokens_that_fit, lambda x: captioner.score(x, "a")):
            with pytest.raises(TypeError, match=r"clip: must be a Clip, not .*load_clip\(path\)"):
                call(wrong)
        with pytest.raises(TypeError, match=r"clip: must be a Clip, not .*load_clip\(path\)"):
            captioner.caption_batch([random_clip(), wrong])
    for wrong in ("clip.mp4", random_clip()):
        with pytest.raises(TypeError, match="clips: must be a list of clips"):
            captioner.caption_batch(wrong)


def test_half_a_character_is_named_wherever_a_text_is_read(captioner, random_clip):
    for call in (
        lambda: captioner.score(random_clip(), "A st\ud83d"),
        lambda: ground(captioner, random_clip(), "A st\ud83d"),
        lambda: captioner.caption(random_clip(), Prompt("Why?", history=[("A\ud83d", "b")])),
    ):
        with pytest.raises(ValueError, match="text=.*: is not UTF-8, or was cut within a character"):
            call()


def test_an_own_generation_config_beside_the_weights_changes_nothing(golden_copy, golden_cases):
    (golden_copy / "generation_config.json").write_text('{"do_sample": true, "temperature": 5.0, "max_length": 3}')
    captioner, case = capkit.load_captioner(golden_copy, device="cpu"), golden_cases[0]
    caption = captioner.caption(capkit.Clip.from_frames(case.frames), case.query, decoding=Decoding(max_new_tokens=24))
    assert caption.token_ids == case.greedy.flatten().tolist()


def test_captioning_says_nothing_on_the_side(tmp_path):
    """No warnings of transformers in a notebook's output, whatever the decoding."""
    code = f"""
import capkit, numpy as np
captioner = capkit.load_captioner({str(GOLDEN)!r}, device="cpu")
clip = capkit.Clip.from_frames(np.zeros((2, 30, 30, 3), np.uint8))
for settings in ({{}}, {{"num_beams": 2}}, {{"temperature": 1.0}}, {{"repetition_penalty": 1.2}}):
    captioner.caption(clip, decoding=capkit.Decoding(max_new_tokens=4, **settings))
captioner.score(clip, "Blue.")
captioner.model.config.max_position_embeddings = len(captioner.processor(clip)["input_ids"][0])  # of ids, not positions
captioner.caption(clip, decoding=capkit.Decoding(max_new_tokens=4))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in (run.stdout + run.stderr).lower() and "deprecat" not in run.stderr.lower(), run.stderr
    assert "[transformers]" not in run.stderr, run.stderr
