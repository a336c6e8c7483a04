"""What people look at: true, escaped, and without scripts."""

import pandas as pd

import capkit
from capkit.playground import browse
from capkit.runs.clips import DEMO_CLIPS
from capkit.sweep import run_sweep
from capkit.views import compare_captions, mark_differences

NASTY = "<script>alert(1)</script> & \u202eright to left \U0001f31f"


def test_words_that_only_one_text_has_are_marked():
    first, second = mark_differences("A red star moves left.", "A blue star moves left, slowly.")
    assert first.count("<u ") == 1 and ">red</u>" in first
    assert second.count("<u ") == 2 and ">blue</u>" in second and ">slowly.</u>" in second
    assert mark_differences("The same.", "the same") == ("The same.", "the same")  # capitals and marks do not count
    assert mark_differences("", "") == ("", "")
    assert mark_differences("", "new")[1].count("<u ") == 1


def test_texts_are_escaped_in_every_part():
    for text in mark_differences(NASTY, "A star.") + mark_differences(NASTY, NASTY):
        assert "<script>" not in text


def test_two_captions_below_the_frames(tmp_path):
    captioner = capkit.load_captioner("demo", device="cpu")
    store = capkit.CaptionStore(tmp_path / "captions.jsonl")
    clip = sorted(DEMO_CLIPS.glob("*.mp4"))[0]
    record = run_sweep(captioner, [clip], store, decodings=[{"max_new_tokens": 5}]).records[0]
    html = compare_captions([record, NASTY], ["<one>", "other"], store=store)._repr_html_()
    assert html.count("data:image/webp;base64,") == 1 and clip.name in html
    assert "&lt;one&gt;" in html and "<script>" not in html and "&lt;script&gt;" in html


def test_a_table_to_browse_is_static_where_nobody_watches():
    table = pd.DataFrame({"cell": ["a", "<b>"], "words": [1.23456, 7.0]})
    html = browse(table, sort_by="words")._repr_html_()
    assert html.index("&lt;b&gt;") < html.index(">a<") and "1.23" in html and "<script" not in html


def test_a_table_to_browse_sorts_and_filters_where_somebody_does(monkeypatch):
    monkeypatch.setattr("capkit.playground.table.is_interactive", lambda: True)
    table = pd.DataFrame({"cell": ["alpha", "Beta", "gamma"], "words": [2, 1, 3]})
    panel = browse(table, sort_by="words")
    (by, ascending, having), shown = panel.children[0].children, panel.children[1]

    def order():
        return [
            name for _, name in sorted((shown.value.find(name), name) for name in table["cell"]) if name in shown.value
        ]

    assert order() == ["gamma", "alpha", "Beta"]
    ascending.value = True
    assert order() == ["Beta", "alpha", "gamma"]
    by.value = None
    assert order() == ["alpha", "Beta", "gamma"]
    having.value = "bet"
    assert order() == ["Beta"]
    having.value = "["  # no pattern, but text
    assert order() == []
