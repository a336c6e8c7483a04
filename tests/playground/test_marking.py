"""The panel for marking: one caption after another, beside its frames; what is pressed is in the store."""

import base64
import re

import pytest
from PIL import Image
from store_records import an_error, make_record

import capkit
from capkit import CaptionStore
from capkit.playground import Marking

TEXT = "A <b>red</b> square."


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for number in range(5):
        store.append(make_record(number, tmp_path / f"{number}.mp4", text=f" {TEXT}"))
    store.append(an_error(make_record(5, tmp_path / "5.mp4")))
    store.strips.mkdir()
    for number in range(5):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(store.strips / f"{number:020x}.webp", "webp")
    return store


def press(panel, name):
    (pressed,) = [one for one in panel.buttons.children if one.description == name]
    assert not pressed.disabled
    pressed.click()


def marks(store):
    return [(record.get("mark"), record.get("wrong_words"), record.get("remark")) for record in store.current()[:5]]


def test_captions_are_marked_one_after_another_with_words_and_a_remark(store):
    panel = Marking(store)
    assert "0.mp4" in panel.shown.value and "caption 1 of 5; 5 not marked" in panel.shown.value
    assert "&lt;b&gt;red" in panel.shown.value and "<b>red" not in panel.shown.value
    (strip,) = re.findall(r"base64,([^\"]+)", panel.shown.value)
    assert base64.b64decode(strip) == (store.strips / f"{0:020x}.webp").read_bytes()
    panel.words.value, panel.remark.value = "red, square,", "it is blue"
    press(panel, "wrong")
    assert "1.mp4" in panel.shown.value and "4 not marked" in panel.shown.value
    assert panel.words.value == panel.remark.value == ""
    press(panel, "right")
    press(panel, "next")
    press(panel, "unsure")
    expected = [("wrong", ["red", "square"], "it is blue"), ("right", [], ""), (None,) * 3, ("unsure", [], "")]
    assert marks(store) == [*expected, (None,) * 3]
    press(panel, "previous")
    assert "? marked unsure" in panel.shown.value
    again = Marking(store.path)  # another sitting
    assert again.place == 2 and "2.mp4" in again.shown.value
    again.go(-2)
    assert again.words.value == "red, square" and again.remark.value == "it is blue"
    assert again.static().html.startswith(again.shown.value)


def test_what_is_wrong_is_said_and_nothing_is_marked(store):
    panel, before = Marking(store), store.path.read_bytes()
    panel.words.value = "green"
    press(panel, "wrong")
    assert "words: &#x27;green&#x27; is not in the caption" in panel.message.value and panel.place == 0
    panel.words.value = "red"
    press(panel, "right")
    assert "are for captions that are wrong" in panel.message.value and store.path.read_bytes() == before
    press(panel, "wrong")
    assert panel.message.value == "" and marks(store)[0] == ("wrong", ["red"], "")


def test_undo_takes_back_what_was_marked_here_one_by_one(store):
    store.mark(f"{1:020x}", "wrong", "red", "before")
    panel = Marking(store)
    press(panel, "right")
    assert panel.place == 1
    panel.words.value = ""
    press(panel, "right")
    for place in (1, 0):
        press(panel, "undo")
        assert panel.place == place
    assert panel.undo_button.disabled and marks(store)[:2] == [(None,) * 3, ("wrong", ["red"], "before")]


def test_the_first_and_the_last_are_the_ends(store):
    panel = Marking(store, store.current()[3:])
    assert panel.previous_button.disabled and not panel.next_button.disabled
    press(panel, "next")
    assert panel.next_button.disabled
    press(panel, "right")
    assert panel.place == 1 and "✓ marked right" in panel.shown.value and marks(store)[4][0] == "right"
    panel.go(-1)
    assert "3.mp4" in panel.shown.value


def test_what_was_edited_since_is_to_be_marked_again(store):
    store.mark(f"{0:020x}", "wrong", "red", "it is blue")
    store.edit(f"{0:020x}", "A blue square.")
    panel = Marking(store)
    assert panel.place == 0 and "marked before the text changed (red): it is blue" in panel.shown.value
    assert panel.words.value == panel.remark.value == ""
    store.edit(f"{0:020x}", "A green square.")  # by somebody else, while the other is read
    press(panel, "right")
    assert marks(store)[0][0] == "outdated"


def test_an_audit_shows_its_error_rate_as_it_is_marked(store):
    sample = capkit.audit(store, 3, seed=2)
    panel = Marking(store, sample)
    assert panel.requests == sample.requests and "num_unmarked" in panel.rate.value and "NaN" not in panel.rate.value
    press(panel, "wrong")
    press(panel, "right")
    assert "0.500" in panel.rate.value and list(sample.error_rate()["num_unmarked"]) == [1]
    assert panel.rate.value in panel.static().html
    assert len(list(sample)) == 1 and "caption 3 of 3; 1 not marked" in panel.shown.value


def test_without_a_caption_there_is_nothing_to_mark(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    store.append(an_error(make_record(5, tmp_path / "5.mp4")))
    with pytest.raises(ValueError, match="captions.jsonl: there is no caption to mark"):
        Marking(store)
