"""The playground, without a browser: what its controls do."""

import threading
import time
from datetime import datetime, timezone
from html import unescape
from pathlib import Path

import pytest

import capkit
from capkit import CaptionStore, Decoding, Prompt, plan_sweep
from capkit.playground import Playground
from capkit.runs.clips import DEMO_CLIPS
from capkit.sweep import read_axes

CLIPS = sorted(map(str, DEMO_CLIPS.glob("*.mp4")))


@pytest.fixture(scope="module")
def demo():
    return capkit.load_captioner("demo", device="cpu")


@pytest.fixture
def panel(demo, tmp_path):
    made = Playground(demo, CLIPS[:2], CaptionStore(tmp_path / "captions.jsonl"), tmp_path)
    made.max_new_tokens.value = 20
    return made


def caption(panel):
    panel.start()
    panel.wait()
    return panel.results[0]


def test_a_result_is_what_captioning_with_its_settings_gives(panel, demo):
    panel.prompt.value, panel.template.value = "What happens?", "vqa"
    panel.strategy.value, panel.num_frames.value = "uniform", 3
    panel.temperature.value, panel.seed.value = 0.7, 5
    record, made = caption(panel)
    decoding = Decoding(max_new_tokens=20, temperature=0.7, seed=5)
    clip = capkit.load_clip(CLIPS[0], {"strategy": "uniform", "num_frames": 3})
    alone = demo.caption(clip, Prompt("What happens?", "vqa"), decoding)
    assert made.token_ids == alone.token_ids and record["text"] == alone.text
    assert panel.store.current() == [record] and panel.store.strip_path(record).exists()
    assert "What happens?" in panel.earlier_prompts.options


def test_two_clips_chosen_at_once_are_read_in_turn(panel, monkeypatch):
    """As in Lab, where messages are handled in several threads: what is captioned is the clip that is shown."""
    load, slow_one_begins, other_is_chosen = capkit.load_clip, threading.Event(), threading.Event()

    def load_slowly(path, *args):
        if path == CLIPS[1]:
            slow_one_begins.set()
            other_is_chosen.wait(0.5)  # it cannot be, while this one is read
        return load(path, *args)

    monkeypatch.setattr("capkit.playground.panel.load_clip", load_slowly)
    other = threading.Thread(target=lambda: setattr(panel.video, "value", CLIPS[1]))
    other.start()
    assert slow_one_begins.wait(10)
    panel.video.value = CLIPS[0]
    other_is_chosen.set()
    record, _ = caption(panel)
    other.join()
    assert record["video"] == panel.video.value == panel.clip.info.path == CLIPS[0]
    assert len(panel.cards.children) == 1


def test_what_has_no_effect_is_grey_and_left_out(panel):
    sampling = (panel.top_p, panel.top_k, panel.min_p, panel.seed)
    panel.top_p.value = 0.5
    assert all(control.disabled for control in sampling) and "greedy" in panel.explained.value
    assert panel.decoding() == Decoding(max_new_tokens=20)
    panel.temperature.value = 0.5
    assert not any(control.disabled for control in sampling) and "sampled" in panel.explained.value
    assert panel.decoding() == Decoding(max_new_tokens=20, temperature=0.5, top_p=0.5, seed=0)
    panel.num_beams.value = 3
    assert panel.temperature.disabled and panel.seed.disabled and "beam" in panel.explained.value
    assert panel.decoding() == Decoding(max_new_tokens=20, num_beams=3)
    assert panel.frames_per_second.disabled
    panel.strategy.value = "fps"
    assert not panel.frames_per_second.disabled
    panel.template.value = "vqa"
    assert panel.frame_numbers.disabled and "numbers no frames" in panel.explained.value


def test_frames_are_shown_with_their_time_and_number(panel):
    clip = capkit.load_clip(CLIPS[0])
    panel.frame.value = 2
    assert (
        f"frame 3 of {len(clip)}" in panel.about_frame.value and "number in the prompt is 2" in panel.about_frame.value
    )
    before = panel.picture.value
    panel.frame.value = 0
    assert panel.picture.value != before and 'alt="frame 1 of' in panel.picture.value
    assert "not seconds" not in panel.about_frame.value
    panel.strategy.value, panel.num_frames.value = "uniform", 3
    assert "not seconds" in panel.about_frame.value and panel.frame.max == 2
    panel.frame_numbers.value = "seconds"
    assert "not seconds" not in panel.about_frame.value
    panel.video.value = CLIPS[1]
    assert panel.clip.info.path == CLIPS[1]


def test_stopped_half_way_what_was_said_stays(panel, demo, monkeypatch):
    head, forward = demo.model.lm_head, demo.model.lm_head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: time.sleep(0.05) or forward(hidden))
    panel.max_new_tokens.value = 500
    panel.start()
    assert panel.caption_button.disabled and not panel.stop_button.disabled
    until = time.monotonic() + 60
    while "▏" not in panel.words.value:
        assert time.monotonic() < until, panel.message.value
        time.sleep(0.01)
    panel.stop()
    panel.wait()
    record, made = panel.results[0]
    assert record["finish_reason"] == "stopped" and 0 < len(made.token_ids) < 500
    assert not panel.caption_button.disabled and panel.stop_button.disabled and panel.words.value == ""


def test_results_stand_side_by_side_with_differences_from_the_baseline(panel):
    first, _ = caption(panel)
    panel.prompt.value = "Describe this video in one sentence."
    second, _ = caption(panel)
    assert [record for record, _ in panel.results] == [second, first]
    newest, oldest = panel.cards.children
    assert "baseline" in oldest.children[0].value and "<u " not in oldest.children[0].value
    assert "baseline" not in newest.children[0].value and "<u " in newest.children[0].value
    newest.children[2].children[0].click()  # make baseline
    assert (
        "baseline" in panel.cards.children[0].children[0].value and "<u " in panel.cards.children[1].children[0].value
    )


def test_results_of_earlier_come_back_with_their_clip(panel, demo, tmp_path):
    first, _ = caption(panel)
    panel.prompt.value = "Which <b>colours</b>?"
    second, _ = caption(panel)
    panel.cards.children[1].children[2].children[1].click()
    panel.cards.children[1].children[1].value = "By hand."
    panel.cards.children[1].children[2].children[1].click()
    again = Playground(demo, CLIPS[:2], CaptionStore(tmp_path / "captions.jsonl"), tmp_path)
    newest, oldest = (card.children[0].value for card in again.cards.children)
    assert "By hand." in oldest and "baseline" in oldest and "edited by hand" in oldest and again.results == []
    assert "Which &lt;b&gt;colours&lt;/b&gt;?" in newest and "Which <b>colours</b>?" in again.earlier_prompts.options
    again.video.value = CLIPS[1]
    assert again.cards.children == ()  # other clips' captions are not to be compared with
    again.max_new_tokens.value = 20
    other, _ = caption(again)
    assert "baseline" in again.cards.children[0].children[0].value and other["video"] == CLIPS[1]
    again.video.value = CLIPS[0]
    caption(again)
    assert len(again.cards.children) == 2  # asked again, it takes the place of what the store had
    assert [record["request"] for record in again.store.current()][:2] == [first["request"], second["request"]]


def test_the_lists_show_which_prompt_it_is(panel):
    assert panel.preset.value == "default" and panel.earlier_prompts.value == ""
    panel.preset.value = "sentence"
    assert panel.prompt.value == "Describe this video in one sentence."
    panel.prompt.value = "Which colours?"
    assert panel.preset.value == "" and panel.prompt.value == "Which colours?"
    caption(panel)
    assert panel.earlier_prompts.value == "Which colours?"
    panel.preset.value = "sentence"  # the same again, after an edit
    assert panel.prompt.value == "Describe this video in one sentence." and panel.earlier_prompts.value == ""
    panel.earlier_prompts.value = "Which colours?"
    assert panel.prompt.value == "Which colours?"


def test_an_edit_is_kept_in_the_store(panel):
    record, _ = caption(panel)
    edit, button = panel.cards.children[0].children[1], panel.cards.children[0].children[2].children[1]
    button.click()
    assert edit.layout.display == "flex"
    panel.store.mark(record, "wrong", remark="no star")
    edit.value = "A star, <b>by hand</b>."
    button.click()
    assert panel.store.current()[0]["edited_text"] == "A star, <b>by hand</b>."
    assert "&lt;b&gt;" in panel.cards.children[0].children[0].value
    assert "marked before the text changed: no star" in panel.cards.children[0].children[0].value


def test_settings_go_to_a_sweep(panel, tmp_path):
    panel.temperature.value, panel.strategy.value = 0.6, "base"
    record, _ = caption(panel)
    panel.cards.children[0].children[2].children[2].click()
    assert "sweep_axes.yaml" in panel.message.value
    (cell,) = plan_sweep(CLIPS[:1], **read_axes(tmp_path / "sweep_axes.yaml")).cells
    assert cell.decoding.to_dict() == record["decoding"] and cell.frame_sampling.strategy == "base"


def test_a_prefix_and_forbidden_words_go_into_captions_and_a_sweep(panel, demo, tmp_path):
    free = caption(panel)[0]["text"].split()
    panel.answer_prefix.value, panel.forbidden_words.value = " I see ", f"{free[0]}, {free[1]} {free[2]},,"
    record, made = caption(panel)
    decoding = Decoding(max_new_tokens=20, forbidden_words=[free[0], f"{free[1]} {free[2]}"])
    alone = demo.caption(capkit.load_clip(CLIPS[0]), Prompt(answer_prefix="I see"), decoding)
    assert (made.text, made.decoding, made.prompt) == (alone.text, alone.decoding, alone.prompt)
    assert record["text"].startswith("I see") and free[0] not in record["text"].split()
    shown = unescape(panel.cards.children[0].children[0].value)
    assert "begins 'I see'" in shown and repr(free[0]) in shown
    panel.cards.children[0].children[2].children[2].click()
    (cell,) = plan_sweep(CLIPS[:1], **read_axes(tmp_path / "sweep_axes.yaml")).cells
    assert (cell.prompt, cell.decoding) == (made.prompt, made.decoding)
    panel.forbidden_words.value = "see"
    panel.start()
    assert "holds 'see', which forbidden_words forbids" in unescape(panel.message.value)


def test_questions_are_asked_before_and_fields_are_filled(panel, demo, tmp_path):
    panel.steps.value, panel.prompt.value = "What is there?\n\n What does it do? ", "Describe {name} in a sentence."
    record, made = caption(panel)
    steps = ("What is there?", "What does it do?")
    asked = Prompt(f"Describe {Path(CLIPS[0]).stem} in a sentence.", steps=steps)
    alone = demo.caption(capkit.load_clip(CLIPS[0]), asked, Decoding(max_new_tokens=20))
    assert made.token_ids == alone.token_ids and record["step_answers"] == [answer for _, answer in alone.steps]
    assert panel.store.current() == [record] and "Describe {name} in a sentence." in panel.earlier_prompts.options
    assert "What is there? → What does it do? → Describe {name}" in panel.cards.children[0].children[0].value
    panel.cards.children[0].children[2].children[2].click()
    (cell,) = plan_sweep(CLIPS[:1], **read_axes(tmp_path / "sweep_axes.yaml")).cells
    assert cell.prompt == Prompt("Describe {name} in a sentence.", steps=steps)
    panel.prompt.value = "By {camera}?"
    panel.start()
    assert "unknown field" in panel.message.value and len(panel.results) == 1
    panel.template.value, panel.prompt.value = "base", "Why?"
    assert panel.steps.disabled and panel.chosen_prompt() == Prompt("Why?", "base")


def test_beam_search_comes_at_once(panel, demo):
    panel.num_beams.value, panel.max_new_tokens.value = 2, 8
    _, made = caption(panel)
    decoding = Decoding(num_beams=2, max_new_tokens=8)
    assert made.token_ids == demo.caption(capkit.load_clip(CLIPS[0]), decoding=decoding).token_ids


def test_errors_are_told_in_the_panel(panel, tmp_path):
    (tmp_path / "broken <b>.mp4").write_bytes(b"nothing")
    panel.video.options = [*panel.video.options, ("broken", str(tmp_path / "broken <b>.mp4"))]
    panel.video.value = str(tmp_path / "broken <b>.mp4")
    assert "broken &lt;b&gt;.mp4" in panel.message.value and panel.clip is None and panel.picture.value == ""
    panel.start()
    assert "no clip" in panel.message.value and not panel.results
    panel.video.value = CLIPS[0]
    assert panel.message.value == ""
    panel.prompt.value = " "
    panel.start()
    assert "prompt" in panel.message.value
    panel.start_seconds.value = 1000
    assert "no frame starts" in panel.message.value
    panel.start_seconds.value = 0
    panel.prompt.value = "Why?"
    assert caption(panel)[0]["prompt"] == "Why?"  # it goes on


def test_a_window_is_a_clip_of_its_own(panel):
    whole, _ = caption(panel)
    panel.end_seconds.value = 2.0
    assert not panel.cards.children
    part, _ = caption(panel)
    assert (part["start_seconds"], part["end_seconds"]) == (0.0, 2.0) and len(panel.cards.children) == 1
    assert "baseline" in panel.cards.children[0].children[0].value  # of its own
    panel.end_seconds.value = 0.0
    assert len(panel.cards.children) == 1 and whole["text"].strip() in unescape(
        panel.cards.children[0].children[0].value
    )


def test_an_uploaded_clip_joins_the_others(panel):
    content = Path(CLIPS[1]).read_bytes()
    file = {"name": "../mine.mp4", "type": "video/mp4", "size": len(content), "content": content}
    panel.upload.value = [file | {"last_modified": datetime.now(timezone.utc)}]
    assert Path(panel.video.value).name == "mine.mp4" and Path(panel.video.value).parent.name == "uploads"
    assert panel.clip.info.path == panel.video.value


def test_a_file_name_joins_the_clips_once(panel):
    for name in (f" {CLIPS[3]} ", CLIPS[0], CLIPS[3]):
        panel.path.value = name
        assert panel.video.value == panel.clip.info.path == name.strip() and panel.path.value == ""
    assert [path for _, path in panel.video.options] == [*CLIPS[:2], CLIPS[3]]
    panel.path.value = "nowhere.mp4"
    assert "nowhere.mp4" in panel.message.value and panel.clip is None
