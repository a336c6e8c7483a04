"""Clips and captions as they are shown: true under every sampling, escaped, and without scripts."""

import random
import re
from dataclasses import replace
from html import unescape

import numpy as np
import papermill
import pytest
from notebook_runner import FAST, run
from PIL import Image
from video_factory import encode_clip

import capkit
from capkit.captioning import Grounding, ground
from capkit.cogvlm2 import pixels_to_frames, preprocess_frames
from capkit.views import captions_table, compare_captions, mark_differences, show_caption, show_clip, show_sweep
from capkit.views.captions import t5_kept
from capkit.views.frames import FRAME_PIXELS, crop_box, draw_crop, unsampled_gaps
from capkit.views.html import BLUE, GREEN, PURPLE, RED, card


def length_of_common_words(first, second):
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = lengths[:]
        for place, other in enumerate(second):
            lengths[place + 1] = before[place] + 1 if word == other else max(before[place + 1], lengths[place])
    return lengths[-1]


NASTY = '<script>alert(1)</script> "quoted" & שלום עולם \u202eback \U0001f31f http'
SAMPLINGS = [
    "chat",
    "base",
    "uniform",
    capkit.FrameSampling("uniform", 3),
    capkit.FrameSampling("fps", 24, 1.0),
    capkit.FrameSampling("fps", 24, 2.5),
]
WINDOWS = [(0.0, None), (1.3, None), (2.0, 5.0)]


def text_of(html):
    return unescape(re.sub(r"<[^>]*>", "", html))


def assert_safe(html):
    """Nothing runs, nothing is fetched, and JupyterLab keeps all of it in a notebook that is not trusted."""
    for forbidden in ("<script", "http:", "https:", "<svg", "<style", "currentcolor", " onerror", "url("):
        assert forbidden not in html.lower()
    for tag in ("div", "span", "b", "bdi", "s", "u", "details", "table"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Ten frames a second for 7.2 seconds."""
    return encode_clip(tmp_path_factory.mktemp("videos") / "seven.mp4", range(72), fps=10)


class TestClip:
    @pytest.mark.parametrize("shape", [(90, 160), (160, 90), (97, 201), (201, 97), (64, 64), (240, 256), (20, 251)])
    @pytest.mark.parametrize("image_size", [224, 112, 56])
    def test_box_is_what_the_model_is_given(self, shape, image_size):
        """Frames whose red is the column and whose green is the row tell where a cut came from."""
        height, width = shape
        frame = np.zeros((1, *shape, 3), np.uint8)
        frame[..., 0], frame[..., 1] = np.arange(width), np.arange(height)[:, None]
        seen = pixels_to_frames(preprocess_frames(frame, image_size))[0].astype(float)
        top, left, box_height, box_width = crop_box(height, width, image_size)
        for channel, first, length, limit in ((0, left, box_width, width), (1, top, box_height, height)):
            line = seen[image_size // 2] if channel == 0 else seen[:, image_size // 2]
            middles = first + (np.arange(image_size) + 0.5) * length / image_size - 0.5
            np.testing.assert_allclose(line[:, channel], middles.clip(0, limit - 1), atol=0.51)

    @pytest.mark.parametrize("shape", [(90, 160), (160, 90), (64, 64)])
    def test_what_is_cut_away_is_grey_and_dark(self, shape):
        box = crop_box(*shape)
        drawn = np.asarray(draw_crop(np.full((*shape, 3), (0, 200, 0), np.uint8), box)).astype(int)
        assert max(drawn.shape) == FRAME_PIXELS
        is_kept = (drawn == (0, 200, 0)).all(-1)
        is_dim = np.ptp(drawn, -1) == 0
        scale = FRAME_PIXELS / max(shape)
        top, left, height, width = (side * scale for side in box)
        rows, columns = np.nonzero(is_kept)  # all but the line around it, 2 pixels wide
        np.testing.assert_allclose([rows.min(), columns.min()], [top + 2, left + 2], atol=1)
        np.testing.assert_allclose([rows.max() + 3, columns.max() + 3], [top + height, left + width], atol=1)
        assert is_dim.mean() == pytest.approx(1 - height * width / (drawn.shape[0] * drawn.shape[1]), abs=0.01)
        assert (drawn[is_dim].max() if is_dim.any() else 0) < 100

    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
    @pytest.mark.parametrize("frame_numbers", ["index", "seconds"])
    def test_numbers_and_times_are_the_models(self, video, captioner, sampling, window, frame_numbers):
        clip = capkit.load_clip(video, sampling, *window, timeout_seconds=None)
        html = show_clip(clip, capkit.Prompt(frame_numbers=frame_numbers)).html
        shown = re.findall(r"<b>(\d+)</b> ([·≠]) ([\d.]+) s", html)
        processor = captioner.processor
        ids = processor.video_ids(clip, capkit.Prompt(frame_numbers=frame_numbers))[1:]
        pad = processor.tokenizer.pad_token_id
        numbered = processor.decode([token if token != pad else processor.tokenizer.bos_token_id for token in ids])
        assert [int(number) for number, _, _ in shown] == list(map(int, re.findall(r"\d+", numbered)))
        assert [float(time) for _, _, time in shown] == np.round(clip.timestamps_seconds, 2).tolist()
        seconds = [round(time - clip.start_seconds) for time in clip.timestamps_seconds]
        marked = [sign == "≠" for _, sign, _ in shown]
        assert marked == [int(one[0]) != second for one, second in zip(shown, seconds, strict=True)]
        assert ("not seconds" in html) == (frame_numbers == "index" and not clip.one_frame_a_second)
        assert html.count("data:image/webp") == len(clip)
        assert_safe(html)

    def test_the_samplings_above_are_of_both_kinds(self, video):
        clips = [capkit.load_clip(video, sampling, timeout_seconds=None) for sampling in SAMPLINGS]
        assert {clip.one_frame_a_second for clip in clips} == {True, False}

    @pytest.mark.parametrize("template", ["vqa", "base"])
    def test_no_numbers_no_warning(self, video, template):
        html = show_clip(
            capkit.load_clip(video, "uniform", timeout_seconds=None), capkit.Prompt(template=template)
        ).html
        assert "not seconds" not in html and "≠" not in html and "carry no numbers" in html
        with pytest.raises(ValueError, match="no effect"):
            show_clip(
                capkit.load_clip(video, timeout_seconds=None), capkit.Prompt("Q", template, frame_numbers="seconds")
            )

    def test_a_frame_that_comes_again_is_said(self, video):
        clip = capkit.load_clip(video, "base", 0.0, 0.5, timeout_seconds=None)
        assert show_clip(clip).html.count("same frame again") == 24 - 5

    def test_what_was_never_sampled(self, video):
        def stretches(*arguments):
            clip = capkit.load_clip(video, *arguments, timeout_seconds=None)
            return [tuple(round(time, 2) for time in stretch) for stretch in unsampled_gaps(clip)]

        assert stretches("chat") == stretches("uniform") == []
        assert stretches("chat", 2.0, 5.0) == []  # what is outside of a window does not count
        assert stretches(capkit.FrameSampling("chat", 3)) == [(2.5, 7.2)]
        assert stretches(capkit.FrameSampling("uniform", 3)) == [(0.5, 3.0), (4.0, 6.6)]
        assert stretches(capkit.FrameSampling("fps", 2, 0.5), 3.0, 7.0) == [(3.5, 4.5), (5.5, 7.0)]
        html = show_clip(capkit.load_clip(video, capkit.FrameSampling("chat", 3), timeout_seconds=None)).html
        assert "Never sampled: 2.50 to 7.20 s; 4.70 s of 7.20 s" in text_of(html)
        assert f"left:{100 * 2.5 / 7.2:.3f}%;width:{100 * 4.7 / 7.2:.3f}%;top:12px;height:4px;background:{RED}" in html

    def test_ticks_stand_at_the_sampled_frames_of_the_whole_clip(self, video):
        clip = capkit.load_clip(video, "chat", 2.0, 5.0, timeout_seconds=None)
        html = show_clip(clip).html
        places = re.findall(r'title="frame at ([\d.]+) s" style="position:absolute;left:([\d.]+)%', html)
        assert [float(time) for time, _ in places] == [2.0, 3.0, 4.0, 4.9]
        np.testing.assert_allclose([float(left) for _, left in places], clip.timestamps_seconds / 7.2 * 100, atol=0.01)
        assert html.count("dotted #888") == 2 and "No part of the window is further" in html  # before it and after it

    def test_frames_from_memory(self, random_clip):
        html = show_clip(random_clip()).html
        assert (
            "frames from memory" in html
            and "No part is further than half a second" in html
            and "not seconds" not in html
        )
        apart = capkit.Clip.from_frames(random_clip().frames, [100, 101, 109])
        assert unsampled_gaps(apart) == [(102.0, 108.5)]
        assert "not seconds" in show_clip(apart).html
        assert unsampled_gaps(capkit.Clip.from_frames(random_clip(1).frames)) == []

    def test_file_names_are_text(self, tmp_path):
        for name in ("a \"b\" 'c' <img src=x onerror=y>.mp4", "שלום \u202e\U0001f31f.mp4"):
            html = show_clip(capkit.load_clip(encode_clip(tmp_path / name, range(5)), timeout_seconds=None)).html
            assert name.replace("\u202e", r"\u202e") in text_of(html) and "<img src=x" not in html
            assert re.search(r"<bdi>[^<]*\.mp4</bdi>", html)


def a_grounding(text, logprobs, grey_logprobs, by_frame=None):
    tokens = re.findall(r"\s*\S+", text)
    arrays = [None if one is None else np.array(one, float) for one in (logprobs, grey_logprobs, by_frame)]
    return Grounding(list(range(len(tokens))), tokens, *arrays)


class TestCaption:
    text = "A red star <moves>."
    grounding = a_grounding(
        text,
        np.log([0.95, 0.5, 0.2, 0.05]),
        np.log([0.95, 0.5, 0.2, 0.05]) - [0, 4, 1.5, -2],
        np.log([[0.95, 0.5, 0.2, 0.05]] * 3) - [[0, 0.1, 0, 0], [0, 3, 0.2, 0], [0, 1, 0.6, 0]],
    )

    def test_tokens_by_how_sure_words_by_support(self):
        html = show_caption(self.text, grounding=self.grounding).html
        chances = re.findall(r'<span title="([\d.]+)%"([^>]*)>([^<]*)<', html)
        assert [(word, float(chance)) for chance, _, word in chances] == [
            *(("A", 95), ("red", 50), ("star", 20), ("&lt;moves&gt;.", 5)),
        ]
        lines = [re.search(r"\d+px \w+|$", style)[0] for _, style, _ in chances]
        assert lines == ["", "2px dotted", "2px dashed", "3px solid"]
        words = re.findall(r'<span title="support ([+-][\d.]+) nats([^"]*)"([^>]*)>', html)
        assert [float(support) for support, _, _ in words] == [0, 4, 1.5, -2]
        assert [re.search(r"\d+px \w+ #\w+|$", style)[0] for _, _, style in words] == [
            *("", f"3px solid {BLUE}", f"2px dashed {BLUE}", f"3px double {PURPLE}"),
        ]
        assert GREEN not in html and RED not in html  # which readers take for right and wrong
        assert [leans for _, leans, _ in words] == [
            *("", "; leans on frame 1 (+3.0), frame 2 (+1.0)", "; leans on frame 2 (+0.6)", ""),
        ]
        assert "support +3.5 nats in all, +0.88 a token" in html and html.count("<tr>") == 5
        assert_safe(html)

    def test_a_word_of_several_tokens_has_the_chance_of_all(self):
        logprobs = np.log([0.5, 0.5, 0.8, 0.25])
        grounding = Grounding([0] * 4, ["A", " st", "ar", " moves."], logprobs, logprobs - 1, None)
        html = show_caption("A star moves.", grounding=grounding).html
        assert re.findall(r'<span title="([\d.]+)%"[^>]*>([^<]*)<', html) == [
            *(("50.0", "A"), ("40.0", "star"), ("25.0", "moves.")),
        ]
        assert "Doubt, for the model's own mistakes." in html and "Support, for words that people changed." in html

    def test_frames_are_named_by_number_and_time(self, random_clip):
        clip = capkit.Clip.from_frames(random_clip().frames, [0, 2, 5])
        html = show_caption(self.text, clip, self.grounding).html
        assert "leans on 1 at 2.00 s (+3.0), 2 at 5.00 s (+1.0)" in html
        frames = html.split("as the model sees it")[1:]
        assert len(frames) == 3
        labels = [text_of(frame.split(">", 1)[1].split("</div></div></div>")[0]) for frame in frames]
        assert labels[:2] == ["0 · 0.00 s", "1 ≠ 2.00 sred"] and labels[2].startswith("2 ≠ 5.00 sstar")
        assert "not seconds" in html
        spoken = {"text": self.text, "status": "ok", "video": "a.mp4", "prompt": "?", "template": "base"}
        spoken |= dict.fromkeys(("num_tokens", "mean_logprob", "finish_reason", "seconds"))
        assert "not seconds" not in show_caption(spoken, clip).html

    def test_a_prefix_is_shown_before_the_tokens(self, captioner, random_clip):
        clip, prompt = random_clip(), capkit.Prompt(answer_prefix="A <b> zeb")
        caption = captioner.caption(clip, prompt, capkit.Decoding(max_new_tokens=6))
        found = ground(captioner, clip, caption)
        views = [
            show_caption(caption),
            show_caption(caption, processor=captioner.processor),
            show_caption(caption, clip, found),
            show_caption({"text": caption.text, "status": "ok", **prompt.to_record()}, grounding=found),
        ]
        assert [text_of(view.html).count("A <b> zeb") for view in views] == [1, 1, 2, 2]
        assert "<span title" in views[1].html.split("A &lt;b&gt; zeb")[1]

    def test_what_is_unusual_about_the_video_is_told(self, random_clip):
        clip = random_clip(2)
        notes = clip.info.notes, replace(clip.info, hdr="PQ").notes
        assert notes[0] == [] and "not tone-mapped" in notes[1][0]
        record = {"text": self.text, "status": "ok", "video": "a.mp4", "prompt": "?", "num_tokens": 5}
        for told, video_notes in (("The video is HDR (PQ): frames are", notes[1]), (None, [])):
            html = show_caption(record | {"video_notes": video_notes}).html
            assert (told in html) if told else ("The video is" not in html)
        assert "The video is HDR (HLG)" in show_clip(replace(clip, info=replace(clip.info, hdr="HLG"))).html

    def test_a_grounding_of_something_else_is_refused(self, random_clip):
        with pytest.raises(ValueError, match="of another text"):
            show_caption("Another one.", grounding=self.grounding)
        with pytest.raises(ValueError, match="3 frames, but a clip of 2"):
            show_caption(self.text, random_clip(2), self.grounding)

    def test_the_end_token_is_not_shown(self, captioner, random_clip):
        clip = random_clip()
        end = captioner.model.config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        ids = [*captioner.processor.continuation_ids("A star."), end]
        nouns = dict(prompt=capkit.Prompt("Why?"), decoding=capkit.Decoding())
        caption = capkit.Caption(" A star.", ids, [-0.5] * len(ids), "eos", seconds=1.0, **nouns)
        for html in (
            show_caption(caption, processor=captioner.processor).html,
            show_caption(caption, clip, ground(captioner, clip, caption)).html,
        ):
            shown = re.findall(r'<span title="[\d.]+%"[^>]*>([^<]*)<', html)
            assert "".join(shown).replace(" ", "") == "Astar." and "end" not in "".join(shown)
            assert f"{len(ids)} tokens, ended by eos" in html

    def test_what_is_beyond_the_t5_limit_is_struck(self):
        text = " ".join(["word"] * 300)
        html = show_caption(text).html
        assert html.count("word</s>") == 1 and len(re.search(r"<s [^>]*>(.*)</s>", html)[1].split()) == 300 - 225
        assert "With a limit of 226 T5 tokens, training would cut off the last 75 words." in html

        class Tokenizer:  # two tokens a word, and </s>
            def __call__(self, text, verbose=True):
                return type("Encoding", (), {"input_ids": [0] * (2 * len(text.split()) + 1)})

        html = show_caption(text, t5_tokenizer=Tokenizer()).html
        assert len(re.search(r"<s [^>]*>(.*)</s>", html)[1].split()) == 300 - 112
        assert t5_kept("two words", Tokenizer(), 5) == len("two words") and t5_kept("two words", Tokenizer(), 4) == 3
        assert t5_kept("two words", Tokenizer(), 2) == 0 and t5_kept("", Tokenizer()) == 0
        assert "<s " not in show_caption("two words", t5_tokenizer=Tokenizer(), t5_limit=5).html
        struck = show_caption(self.text, grounding=self.grounding, t5_tokenizer=Tokenizer(), t5_limit=5).html
        assert [text_of(lost).strip() for lost in re.findall(r"<s .*?</s>", struck)] == ["star <moves>."]

    def test_whatever_is_said_is_text(self, random_clip):
        grounding = a_grounding(NASTY, [-1] * len(NASTY.split()), [-2] * len(NASTY.split()))
        record = {"text": NASTY, "status": "ok", "video": f"x/{NASTY}", "prompt": NASTY, "template": "chat"}
        record |= {"num_tokens": 1, "mean_logprob": -1.0, "finish_reason": NASTY, "seconds": 1.0}
        failed = record | {"status": "error", "error": NASTY, "text": None, "num_tokens": None}
        views = [show_caption(NASTY, random_clip(), grounding), show_caption(record), show_caption(failed)]
        views += [compare_captions([record, failed, NASTY], [NASTY, "b", "c"]), compare_captions([record, NASTY])]
        views += [captions_table([record, failed])]
        for view in views:
            assert_safe(view.html)
            assert "&lt;script&gt;" in view.html and "שלום" in view.html and "\U0001f31f" in view.html
        assert "not captioned: " in views[2].html and "not captioned: " in views[3].html


def test_a_table_has_captions_in_full_and_errors_without_the_path():
    record = {"video": "/clips/a.mp4", "status": "ok", "text": "word " * 300, "num_tokens": 301, "mean_logprob": -0.25}
    record |= {"finish_reason": "eos", "seconds": 1.23456}
    failed = {"video": "/clips/b.mp4", "status": "error", "error": "/clips/b.mp4: no such file", "text": None}
    html = captions_table([record, failed, failed], limit=2).html
    cells = [text_of(cell).strip() for cell in re.findall(r"<td .*?</td>", html)]
    assert cells[6:12] == ["a.mp4", ("word " * 300).strip(), "301", "eos", "-0.25", "1.23"]
    assert cells[12:] == ["b.mp4", "not captioned: no such file", "", "", "", ""] and "1 more in the store" in html
    seen = record | {"timestamps_seconds": [float(second) for second in range(24)], "duration_seconds": 60.0}
    assert "saw only 24 of 60 s" in text_of(captions_table([seen]).html) and "saw only" not in html
    for by_hand in (record, failed):  # a caption, and an error in whose place somebody has written one
        html = captions_table([by_hand | {"edited_text": "By hand."}]).html
        assert "By hand." in html and "edited by hand" in html and "word" not in html and "no such file" not in html
    html = card(failed | {"edited_text": "By hand.", "prompt": "What?"}, "")
    assert "By hand." in html and "edited by hand" in html and "not captioned: no such file" in html


def test_a_clip_of_which_only_a_part_was_seen_says_so_beside_any_caption(tmp_path):
    video = encode_clip(tmp_path / "long.mp4", range(60), fps=2)
    part, all_of_it = (capkit.load_clip(video, sampling, timeout_seconds=None) for sampling in ("chat", "uniform"))
    for show in (lambda clip: show_caption("A star.", clip), lambda clip: compare_captions(["A star."], clip=clip)):
        assert "long.mp4, saw only 24 of 30 s" in text_of(show(part).html)
        assert "long.mp4" in text_of(show(all_of_it).html) and "saw only" not in show(all_of_it).html


class TestSideBySide:
    def test_words_that_the_first_does_not_have_are_marked(self, random_clip):
        texts = ["A red star moves left.", "A blue star moves left.", "A red star moves left."]
        html = compare_captions(texts, ["one", "two", "three"], clip=random_clip()).html
        assert re.findall(r"<u [^>]*>([^<]*)</u>", html) == ["blue"]  # the third has all that the first says
        html = compare_captions(texts[:2], ["one", "two"]).html
        assert re.findall(r"<u [^>]*>([^<]*)</u>", html) == ["red", "blue"]
        assert "<u " not in compare_captions(texts[:1]).html
        with pytest.raises(ValueError, match="0 captions with 0 names"):
            compare_captions([])

    def test_as_few_words_as_can_be_are_marked(self):
        """Against a longest common subsequence by dynamic programming; in texts that repeat themselves, too."""
        pairs = [("a dog runs and " * 60, "a cat runs and " * 60), ("", "a"), ("a", "")]
        for seed in range(200):
            draw = random.Random(seed)
            pairs.append(tuple(" ".join(draw.choices("abcdefg"[: draw.randint(1, 7)], k=12)) for _ in range(2)))
        for first, second in pairs:
            marked = mark_differences(first, second, has_styles=False)
            left = [re.sub("<u>.*?</u>", "", html).split() for html in marked]
            assert left[0] == left[1] and len(left[0]) == length_of_common_words(first.split(), second.split())
            assert [re.sub("</?u>", "", html) for html in marked] == [first, second]

    def test_a_caption_that_repeats_itself_is_compared_at_once(self):
        """With difflib this took more than a minute."""
        marked = mark_differences("a dog runs and " * 3000, "a cat runs and " * 3000)
        assert [html.count("<u ") for html in marked] == [3000, 3000]

    def test_settings_that_differ_are_the_names(self):
        record = {"video": "a.mp4", "status": "ok", "template": "chat", "finish_reason": "eos", "seconds": 1.0}
        record |= {"num_tokens": 1, "mean_logprob": -1.0, "text": "A star."}
        html = compare_captions([record | {"prompt": "Why?"}, record | {"prompt": "Who?"}]).html
        assert ">Why?</b>" in html and ">Who?</b>" in html and ">chat" not in html
        assert ">1</b>" in compare_captions([record, record]).html

    def test_a_sweep_in_short(self, captioner, video, tmp_path):
        (tmp_path / "empty.mp4").touch()
        result = capkit.run_sweep(
            captioner,
            [video, tmp_path / "empty.mp4"],
            tmp_path / "captions.jsonl",
            prompts=["Why?", "<b>Who</b>?"],
            decodings=[{"max_new_tokens": 4}],
        )
        html = show_sweep(result).html
        assert html.count("empty.mp4") and "not captioned: " in html and "2 cells, 2 clips" in html
        assert "<b>Who" not in html and "&lt;b&gt;Who" in html
        assert_safe(html)


class TestNotebook:
    def test_as_it_stands(self, executed):
        tmp_path, _, shown = executed("02")
        page = (tmp_path / "runs" / "view" / "gallery.html").read_text()
        assert (
            page.count('<div class="caption">') == 4
            and page.count('<div class="row" role="row">') == 2
            and str(tmp_path / "runs" / "view" / "gallery.html") in shown
        )
        assert "not seconds" in shown and "word by word" in shown and "Underlined" in shown
        assert "<script" not in shown and (tmp_path / "out.ipynb").stat().st_size < 8e6

    def test_a_store_of_an_earlier_run(self, tmp_path, captioner, video):
        result = capkit.run_sweep(captioner, [video], tmp_path / "mine.jsonl", decodings=[{"max_new_tokens": 4}])
        store = capkit.CaptionStore(tmp_path / "mine.jsonl")
        store.edit(result.records[0]["request"], "Written by <hand>.")
        _, shown = run("02", tmp_path, store="mine.jsonl", output_dir="out", order_by="")
        assert "edited by hand" in shown and "Written by &lt;hand&gt;." in shown
        assert len(store.lines()) == 2 and not (tmp_path / "out" / "captions.jsonl").exists()

    @pytest.mark.parametrize("num_left", [1, 0])
    def test_a_store_whose_clips_are_gone(self, tmp_path, captioner, num_left):
        clips = [encode_clip(tmp_path / f"{name}.mp4", range(30), fps=10) for name in "abc"]
        few = {"max_new_tokens": 4}
        store = capkit.CaptionStore(tmp_path / "mine.jsonl")
        for record in capkit.caption_clips(captioner, capkit.find_clips(clips), store, decoding=few):
            store.edit(record["request"], "A star.")
        for clip in clips[: 3 - num_left]:
            clip.unlink()
        _, shown = run("02", tmp_path, store="mine.jsonl", output_dir="out", order_by="", look_at=1)
        assert "b.mp4: no such file" in shown
        rest = "shown instead is {clips[2]}, the first that can be read" if num_left else "nor can any other video"
        assert rest.format(clips=clips) in shown and ("Each word with the video" in shown) == bool(num_left)
        assert (tmp_path / "out" / "gallery.html").read_text().count("data:image/webp;base64,") == 3

    @pytest.mark.parametrize(
        "parameters, message",
        [
            ({"store": "nowhere.jsonl"}, "store='nowhere.jsonl': no such file"),
            ({"look_at": 99, "limit": 1, **FAST}, "look_at=99: there are not so many captions"),
            ({"orderby": "text"}, "unknown parameter 'orderby'; did you mean 'order_by'?"),
        ],
    )
    def test_wrong_parameters_are_named(self, tmp_path, parameters, message):
        with pytest.raises(papermill.PapermillExecutionError) as error:
            run("02", tmp_path, **parameters)
        assert message in error.value.evalue


def test_pictures_are_small():
    """A clip of 24 frames of real size stays far under what a notebook may hold."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 45, 80, 3), dtype=np.uint8)
    frames = np.stack([np.asarray(Image.fromarray(frame).resize((1280, 720))) for frame in noise])
    assert len(show_clip(capkit.Clip.from_frames(frames)).html) < 600_000
