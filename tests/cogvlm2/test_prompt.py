"""The prompt checks itself, and becomes the text that the original writes."""

import json

import numpy as np
import pytest

from capkit import Clip, Prompt

HISTORY = (("What is it?", "A harbour."), ("When?", "At dawn."))


def test_strings_of_numpy_become_pythons():
    prompt = Prompt(np.str_("Why?"), np.str_("vqa"), [(np.str_("a"), "b")])
    assert repr(prompt) == repr(Prompt("Why?", "vqa", [("a", "b")]))


def test_of_takes_a_text_a_dictionary_or_itself():
    prompt = Prompt("Why?", "vqa", HISTORY)
    assert Prompt.of("Why?") == Prompt("Why?") and Prompt.of(prompt) is prompt
    assert Prompt.of({"text": "Why?", "template": "vqa", "history": [list(turn) for turn in HISTORY]}) == prompt
    assert len({prompt, Prompt("Why?", "vqa", list(HISTORY))}) == 1


@pytest.mark.parametrize(
    "value, message",
    [
        ("", "prompt='': must be a text that is not empty"),
        (None, "prompt=None: must be a text"),
        (
            {"txt": "Why?"},
            "unknown field 'txt'; did you mean 'text'? known: text, template, history, frame_numbers, answer_prefix",
        ),
        ({"template": "poem"}, "template='poem': must be one of 'chat', 'vqa', 'base'"),
        ({"history": ["ab"]}, "history='ab': must be (question, answer) pairs"),
        ({"history": zip(["a"], ["b"], strict=True)}, "must be (question, answer) pairs"),
        ({"history": [{"question": "a", "answer": "b"}]}, "must be (question, answer) pairs"),
        ({"history": [5]}, "history=5: must be (question, answer) pairs"),
        ({"template": "base", "history": HISTORY}, "history: no effect"),
        ({"template": "vqa", "frame_numbers": "seconds"}, 'frame_numbers="seconds": no effect'),
    ],
)
def test_what_cannot_be_asked_is_refused(value, message):
    with pytest.raises(ValueError) as error:
        Prompt.of(value)
    assert message in str(error.value)


def test_the_text_after_the_frames():
    """As the original's build_conversation_input_ids writes it."""
    assert Prompt("Why?").full_text == "Question: Why? Answer:"
    assert Prompt("Why?", "vqa").full_text == "Question: Why? Short answer:"
    assert Prompt("Why?", "base").full_text == "Why?"
    turns = "Question: What is it? Answer: A harbour.\nQuestion: When? Answer: At dawn.\n"
    assert Prompt("Why?", history=HISTORY).full_text == f"{turns}Question: Why? Answer:"


def test_steps_are_asked_one_after_another():
    prompt = Prompt.of(["Who?", "Where?", "Why?"])
    assert prompt == Prompt("Why?", steps=("Who?", "Where?")) and Prompt.of(["Why?"]) == Prompt("Why?")
    assert prompt.title == "Who? → Where? → Why?" and Prompt("Why?").title == "Why?"
    assert prompt.after([]) == Prompt("Who?")
    assert prompt.after([" Ann. "]) == Prompt("Where?", history=[("Who?", "Ann.")])
    assert prompt.after([" Ann.", "Here."]) == Prompt("Why?", history=[("Who?", "Ann."), ("Where?", "Here.")])
    one = Prompt("Why?", "vqa", HISTORY, steps=["Who?"])
    assert one.after([""]) == Prompt("Why?", "vqa", [*HISTORY, ("Who?", "")]) and Prompt("Why?").after([]) == Prompt(
        "Why?"
    )
    record = json.loads(json.dumps(one.to_record()))
    assert (
        record["steps"] == ["Who?"] and Prompt.from_record(record) == one and "steps" not in Prompt("Why?").to_record()
    )
    with pytest.raises(ValueError, match="one after another"):
        prompt.full_text  # noqa: B018


def test_numbers_of_the_frames(random_clip):
    clip = Clip.from_frames(random_clip(3).frames, [0.0, 1.6, 9.4])
    assert Prompt().numbers(clip) == [0, 1, 2]
    assert Prompt(frame_numbers="seconds").numbers(clip) == [0, 2, 9]
    assert Prompt(template="vqa").numbers(clip) == [None] * 3


def test_goes_through_a_record_and_back():
    prompt = Prompt("Why?", history=HISTORY, frame_numbers="seconds")
    record = json.loads(json.dumps({"video": "a.mp4", **prompt.to_record()}))
    assert record["prompt"] == "Why?" and record["frame_numbers"] == "seconds" and Prompt.from_record(record) == prompt
