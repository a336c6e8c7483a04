"""The playground, without a browser: what its controls do."""

import shutil
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
from capkit.views import GREEN, RED

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


def cards(panel):
    """The cards that are shown, the newest first."""
    return sorted((*panel.cards.children, *panel.baseline.children), key=lambda card: int(card.layout.order))


def earlier(panel):
    """The prompts in the list of earlier ones."""
    return [prompt for _, prompt in panel.earlier_prompts.options]


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
    assert "What happens?" in earlier(panel)


def test_two_clips_chosen_at_once_are_read_in_turn(panel, monkeypatch):
    """As in Lab, where messages are handled in several threads: what is captioned is the clip that is shown."""
    load, slow_one_begins, other_is_chosen = capkit.load_clip, threading.Event(), threading.Event()

    def load_slowly(path, *args):
        if path == CLIPS[1]:
            slow_one_begins.set()
            other_is_chosen.wait(0.5)  # it cannot be, while this one is read
        return load(path, *args)

    monkeypatch.setattr("capkit.playground.chooser.load_clip", load_slowly)
    other = threading.Thread(target=lambda: setattr(panel.video, "value", CLIPS[1]))
    other.start()
    assert slow_one_begins.wait(10)
    panel.video.value = CLIPS[0]
    other_is_chosen.set()
    record, _ = caption(panel)
    other.join()
    assert record["video"] == panel.video.value == panel.clip.info.path == CLIPS[0]
    assert len(cards(panel)) == 1


def test_what_has_no_effect_is_grey_and_left_out(panel):
    sampling = (panel.top_p, panel.top_k, panel.min_p, panel.seed)
    panel.top_p.value = 0.5
    assert all(control.disabled for control in sampling) and "greedy" in panel.explained.value
    assert panel.settings.decoding() == Decoding(max_new_tokens=20)
    panel.temperature.value = 0.5
    assert not any(control.disabled for control in sampling) and "sampled" in panel.explained.value
    assert panel.settings.decoding() == Decoding(max_new_tokens=20, temperature=0.5, top_p=0.5, seed=0)
    panel.num_beams.value = 3
    assert panel.temperature.disabled and panel.seed.disabled and "beam" in panel.explained.value
    assert panel.settings.decoding() == Decoding(max_new_tokens=20, num_beams=3)
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
    newest, oldest = cards(panel)
    assert "· baseline" in oldest.shown.value and "<u " not in oldest.shown.value
    assert "· baseline" not in newest.shown.value and "<u " in newest.shown.value
    newest.baseline_button.click()  # make baseline
    assert "baseline" in cards(panel)[0].shown.value and "<u " in cards(panel)[1].shown.value


def test_results_of_earlier_come_back_with_their_clip(panel, demo, tmp_path):
    first, _ = caption(panel)
    panel.prompt.value = "Which <b>colours</b>?"
    second, _ = caption(panel)
    cards(panel)[1].edit_button.click()
    cards(panel)[1].edit.value = "By hand."
    cards(panel)[1].edit_button.click()
    again = Playground(demo, CLIPS[:2], CaptionStore(tmp_path / "captions.jsonl"), tmp_path)
    newest, oldest = (card.shown.value for card in cards(again))
    assert "By hand." in oldest and "baseline" in oldest and "edited by hand" in oldest and again.results == []
    assert "Which &lt;b&gt;colours&lt;/b&gt;?" in newest and "Which <b>colours</b>?" in earlier(again)
    again.video.value = CLIPS[1]
    assert cards(again) == []  # other clips' captions are not to be compared with
    again.max_new_tokens.value = 20
    other, _ = caption(again)
    assert "baseline" in cards(again)[0].shown.value and other["video"] == CLIPS[1]
    again.video.value = CLIPS[0]
    caption(again)
    assert len(cards(again)) == 2  # asked again, it takes the place of what the store had
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
    edit, button = cards(panel)[0].edit, cards(panel)[0].edit_button
    button.click()
    assert edit.layout.display == "flex" and not panel.message.value
    panel.store.mark(record, "wrong", remark="no star")
    edit.value = "A star, <b>by hand</b>."
    button.click()
    assert panel.store.current()[0]["edited_text"] == "A star, <b>by hand</b>."
    assert "kept" in panel.message.value and GREEN in panel.message.value and RED not in panel.message.value
    assert "&lt;b&gt;" in cards(panel)[0].shown.value
    assert "marked before the text changed: no star" in cards(panel)[0].shown.value


def test_settings_go_to_a_sweep(panel, tmp_path):
    panel.temperature.value, panel.strategy.value = 0.6, "base"
    record, _ = caption(panel)
    cards(panel)[0].sweep_button.click()
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
    shown = unescape(cards(panel)[0].shown.value)
    assert "begins 'I see'" in shown and repr(free[0]) in shown
    cards(panel)[0].sweep_button.click()
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
    assert panel.store.current() == [record] and "Describe {name} in a sentence." in earlier(panel)
    assert "What is there? → What does it do? → Describe {name}" in cards(panel)[0].shown.value
    cards(panel)[0].sweep_button.click()
    (cell,) = plan_sweep(CLIPS[:1], **read_axes(tmp_path / "sweep_axes.yaml")).cells
    assert cell.prompt == Prompt("Describe {name} in a sentence.", steps=steps)
    panel.prompt.value = "By {camera}?"
    panel.start()
    assert "unknown field" in panel.message.value and len(panel.results) == 1
    panel.template.value, panel.prompt.value = "base", "Why?"
    assert panel.steps.disabled and panel.settings.chosen_prompt() == Prompt("Why?", "base")


def test_beam_search_comes_at_once(panel, demo):
    panel.num_beams.value, panel.max_new_tokens.value = 2, 8
    _, made = caption(panel)
    decoding = Decoding(num_beams=2, max_new_tokens=8)
    assert made.token_ids == demo.caption(capkit.load_clip(CLIPS[0]), decoding=decoding).token_ids


def test_errors_are_told_in_the_panel(panel, tmp_path):
    (tmp_path / "broken <b>.mp4").write_bytes(b"nothing")
    panel.video.options = [*panel.video.options, ("broken", str(tmp_path / "broken <b>.mp4"))]
    panel.video.value = str(tmp_path / "broken <b>.mp4")
    assert "broken &lt;b&gt;.mp4" in panel.chooser.message.value and panel.clip is None and panel.picture.value == ""
    panel.start()
    assert "no clip" in panel.message.value and not panel.results
    panel.video.value = CLIPS[0]
    assert panel.message.value == panel.chooser.message.value == ""
    panel.prompt.value = " "
    panel.start()
    assert "prompt" in panel.message.value
    panel.start_seconds.value = 1000
    assert "no frame starts" in panel.chooser.message.value and panel.message.value == ""
    panel.start_seconds.value = 5
    panel.end_seconds.value = 3
    said = unescape(panel.chooser.message.value)
    assert '"to second" must be None or above "from second", 5' in said and "end_seconds" not in said
    panel.start_seconds.value = panel.end_seconds.value = 0
    assert panel.chooser.message.value == ""
    panel.prompt.value = "Why?"
    assert caption(panel)[0]["prompt"] == "Why?"  # it goes on


def test_a_window_is_a_clip_of_its_own(panel):
    whole, _ = caption(panel)
    panel.end_seconds.value = 2.0
    assert not cards(panel)
    part, _ = caption(panel)
    assert (part["start_seconds"], part["end_seconds"]) == (0.0, 2.0) and len(cards(panel)) == 1
    assert "baseline" in cards(panel)[0].shown.value  # of its own
    panel.end_seconds.value = 0.0
    assert len(cards(panel)) == 1 and whole["text"].strip() in unescape(cards(panel)[0].shown.value)


def test_an_uploaded_clip_joins_the_others(panel, demo, tmp_path):
    content = Path(CLIPS[1]).read_bytes()
    file = {"name": "../mine.mp4", "type": "video/mp4", "size": len(content), "content": content}
    panel.upload.value = [file | {"last_modified": datetime.now(timezone.utc)}]
    assert Path(panel.video.value).name == "mine.mp4" and Path(panel.video.value).parent.name == "uploads"
    assert panel.clip.info.path == panel.video.value
    again = Playground(demo, CLIPS[:2], panel.store, tmp_path)
    assert [path for _, path in again.video.options] == [*CLIPS[:2], panel.video.value]  # after a restart
    other = file | {"content": Path(CLIPS[2]).read_bytes(), "last_modified": datetime.now(timezone.utc)}
    for name in ("mine (2).mp4", "mine (2).mp4"):  # another of the same name, twice
        panel.upload.value = ()
        panel.upload.value = [other]
        assert Path(panel.video.value).name == name
    assert (tmp_path / "uploads" / "mine.mp4").read_bytes() == content and len(panel.video.options) == 4


def test_a_file_name_joins_the_clips_once(panel):
    for name in (f" {CLIPS[3]} ", CLIPS[0], CLIPS[3]):
        panel.path.value = name
        assert panel.video.value == panel.clip.info.path == name.strip() and panel.path.value == ""
    assert [path for _, path in panel.video.options] == [*CLIPS[:2], CLIPS[3]]
    panel.path.value = "nowhere.mp4"
    assert "nowhere.mp4" in panel.chooser.message.value and panel.path.value == "nowhere.mp4"  # to be mended
    assert panel.video.value == panel.clip.info.path == CLIPS[3] and len(panel.video.options) == 3
    panel.video.value = CLIPS[0]
    assert panel.chooser.message.value == ""


def test_paths_are_understood_as_people_paste_them(panel, tmp_path):
    folder = tmp_path / "my clips"
    folder.mkdir()
    for name in ("b.mp4", "it's a.mp4"):
        shutil.copy(CLIPS[0], folder / name)
    (folder / "notes.txt").write_text("none")
    quoted = f"'{folder}/b.mp4'"
    escaped = str(folder / "it's a.mp4").replace(" ", "\\ ").replace("'", "\\'")
    for text, names in (
        (quoted, ["b.mp4"]),
        (f'"{folder}/b.mp4"', ["b.mp4"]),
        (escaped, ["it's a.mp4"]),
        (str(folder / "it's a.mp4"), ["it's a.mp4"]),
        ((folder / "it's a.mp4").as_uri(), ["it's a.mp4"]),
        (f"{folder}/*.mp4", ["b.mp4", "it's a.mp4"]),
        (f"{quoted} {escaped}", ["b.mp4", "it's a.mp4"]),
        (str(folder), ["b.mp4", "it's a.mp4"]),
    ):
        panel.video.options, panel.video.value = panel.video.options[:2], CLIPS[0]
        panel.path.value = text
        assert [label for label, _ in panel.video.options[2:]] == names, text
        assert Path(panel.clip.info.path).name == names[0] and panel.path.value == "", text
    assert "2 clips added" in panel.chooser.message.value and ".txt" in panel.chooser.message.value
    assert panel.video.options[:2] == tuple((Path(path).name, path) for path in CLIPS[:2])


def test_a_text_being_typed_survives_whatever_arrives(panel, demo):
    first, _ = caption(panel)
    panel.prompt.value = "What happens?"
    second, _ = caption(panel)
    newest, baseline = cards(panel)
    newest.edit_button.click()
    newest.edit.value = "By hand, half"
    before = panel.cards.children
    panel.prompt.value = "Which colours?"
    caption(panel)
    assert panel.cards.children[: len(before)] == before  # the page keeps these boxes, and the cursor in them
    assert [card.record["prompt"] for card in cards(panel)] == ["Which colours?", "What happens?", first["prompt"]]
    assert newest.is_edited and newest.edit.value == "By hand, half"
    baseline.edit_button.click()
    baseline.edit.value = "This too"
    panel.video.value = CLIPS[1]
    caption(panel)
    panel.video.value = CLIPS[0]
    cards(panel)[0].baseline_button.click()
    assert newest.is_edited and newest.edit.value == "By hand, half" and baseline.edit.value == "This too"
    newest.edit_button.click()
    assert not newest.is_edited and baseline.is_edited
    baseline.discard_button.click()
    texts = {record["request"]: record.get("edited_text") for record in panel.store.current()}
    assert texts[second["request"]] == "By hand, half" and texts[first["request"]] is None


def test_a_stored_card_being_edited_survives_its_own_new_caption(panel, demo, tmp_path):
    first, _ = caption(panel)
    again = Playground(demo, CLIPS[:1], panel.store, tmp_path)
    again.max_new_tokens.value = 20
    (card,) = cards(again)
    card.edit_button.click()
    card.edit.value = "By hand"
    assert caption(again)[0]["request"] == first["request"]
    assert cards(again) == [card] and card.edit.value == "By hand"
    card.edit_button.click()
    assert panel.store.current()[0]["edited_text"] == "By hand" and "By hand" in card.shown.value
    caption(again)
    assert "By hand" in cards(again)[0].shown.value  # a rerun never overwrites it


def test_words_come_under_the_picture_of_their_own_clip(panel, demo, monkeypatch):
    head, forward = demo.model.lm_head, demo.model.lm_head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: time.sleep(0.05) or forward(hidden))
    panel.start()
    assert panel.words_clip.value == ""
    panel.video.value = CLIPS[1]
    assert Path(CLIPS[0]).name in panel.words_clip.value and "<img" in panel.words_clip.value
    until = time.monotonic() + 60
    while "▏" not in panel.words.value:
        assert time.monotonic() < until, panel.message.value
        time.sleep(0.01)
    panel.video.value = CLIPS[0]
    assert panel.words_clip.value == ""
    panel.video.value = CLIPS[1]
    panel.wait()
    assert panel.words_clip.value == panel.words.value == "" and cards(panel) == []
    panel.video.value = CLIPS[0]
    assert [card.record for card in cards(panel)] == [panel.results[0][0]]


def test_a_card_gives_its_settings_back(panel):
    panel.prompt.value, panel.steps.value, panel.template.value = "What {name}?", "One?\nTwo?", "vqa"
    panel.strategy.value, panel.frames_per_second.value, panel.end_seconds.value = "fps", 2.0, 3.0
    panel.temperature.value, panel.top_k.value, panel.seed.value = 0.7, 5, 9
    panel.answer_prefix.value, panel.forbidden_words.value = "I see", "star, a cross"
    asked = chosen(panel)
    record, _ = caption(panel)
    (card,) = cards(panel)
    panel.settings.apply(caption_of_defaults(panel))
    assert (
        panel.settings.decoding() == Decoding(max_new_tokens=20) and panel.settings.frame_sampling().strategy == "chat"
    )
    card.settings_button.click()
    assert chosen(panel) == asked
    assert len(panel.clip) == 6 and cards(panel) == [card]
    assert caption(panel)[0]["request"] == record["request"]
    record["decoding"] = record["decoding"] | {"max_new_tokens": 5000, "word_bias": {"moon": 1.0}}
    card.settings_button.click()
    assert "left out: max_new_tokens, word_bias" in panel.message.value


def chosen(panel):
    return panel.settings.chosen_prompt(), panel.settings.frame_sampling(), panel.settings.decoding()


def caption_of_defaults(panel):
    window = {"start_seconds": 0.0, "end_seconds": None}
    return Prompt().to_record() | window | {"frame_sampling": "chat", "decoding": {"max_new_tokens": 20}}


def test_a_card_says_in_words_what_differs_from_the_baseline(panel):
    caption(panel)
    panel.prompt.value, panel.temperature.value, panel.num_frames.value = "Which colours?", 0.5, 4
    caption(panel)
    card, baseline = cards(panel)
    said = unescape(card.shown.value).split("differs from the baseline: ")[1].split("</div>")[0].split(" · ")
    assert said == [
        "another prompt",
        "frames, at most 4 instead of 24",
        "temperature 0.5 instead of 0.0",
        "seed 0 instead of none",
    ]
    assert "differs" not in baseline.shown.value and panel.baseline.children == (baseline,)
    card.baseline_button.click()
    assert "differs" not in card.shown.value and "temperature 0.0 instead of 0.5" in baseline.shown.value
    assert panel.baseline.children == (card,) and panel.cards.children == (baseline,)


def test_a_folded_card_shows_its_beginning_and_nothing_stretches(panel):
    caption(panel)
    (card,) = cards(panel)
    card.record["edited_text"] = "the same again " * 500
    card.show(card.record, "")
    assert "max-height" in card.shown.value
    card.fold_button.click()
    assert "the same again" in card.shown.value and len(card.shown.value) < 800
    card.show(card.record, "")  # as when another caption arrives
    assert len(card.shown.value) < 800 and card.edit_button.layout.display == "none"
    card.fold_button.click()
    assert len(card.shown.value) > 7000 and card.edit_button.layout.display is None


def test_cards_make_one_sweep_which_is_run_here(panel, demo, tmp_path):
    caption(panel)
    panel.prompt.value, panel.temperature.value = "Which colours?", 0.5
    caption(panel)
    for card in cards(panel):
        card.sweep_button.click()
    axes = read_axes(tmp_path / "sweep_axes.yaml")
    cells = plan_sweep(CLIPS[:1], **axes).cells
    asked = {(prompt, decoding) for prompt, decoding in ((cell.prompt.text, str(cell.decoding)) for cell in cells)}
    assert (
        len(asked) == 4
        and "2 prompts × 2 decodings × 1 frame sampling = 4 captions of a clip" in panel.sweep.about.value
    )
    assert "8 of all 2 clips" in panel.sweep.about.value
    panel.sweep.here_button.click()
    panel.wait()
    assert len(cards(panel)) == 4 and len(panel.store.current()) == 4 and "4 captions" in panel.message.value
    panel.sweep.all_button.click()
    assert panel.caption_button.disabled and not panel.stop_button.disabled
    panel.wait()
    assert len(panel.store.current()) == 8 and "2 of 2 clips" in panel.message.value
    panel.video.value = CLIPS[1]
    assert {(card.record["prompt"], str(Decoding.of(card.record["decoding"]))) for card in cards(panel)} == asked
    panel.video.value = CLIPS[0]
    assert sum(card.sweep_button.description == "out of the sweep" for card in cards(panel)) == 2
    panel.sweep.clear_button.click()
    assert panel.sweep.layout.display == "none" and cards(panel)[0].sweep_button.description == "to a sweep"


def test_a_sweep_stops_after_its_clip(panel):
    caption(panel)
    cards(panel)[0].sweep_button.click()
    run = panel._run_sweep
    panel._run_sweep = lambda *arguments: panel.stop() or run(*arguments)
    panel.sweep.all_button.click()
    panel.wait()
    assert "1 of 2 clips" in panel.message.value and not panel.caption_button.disabled
