"""What people look at: true, escaped, and without scripts."""

import io
import re
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from video_factory import encode_clip

import capkit
import capkit.__main__
from capkit.captioning import DEMO_NOTICE
from capkit.playground import Playground, browse
from capkit.runs.clips import DEMO_CLIPS
from capkit.sweep import run_sweep
from capkit.video import draw_strip
from capkit.views import captions_page, compare_captions, mark_differences, show_caption, show_captions

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


def test_a_table_to_browse_is_filtered_by_the_names_of_its_rows(monkeypatch):
    monkeypatch.setattr("capkit.playground.table.is_interactive", lambda: True)
    cells = pd.Index(["sentence · greedy", "objects · temperature=0.8"], name="cell")
    panel = browse(pd.DataFrame({"words": [2, 1]}, index=cells))
    having, shown = panel.children[0].children[-1], panel.children[1]
    having.value = "Objects"
    assert "objects · temperature=0.8" in shown.value and "sentence" not in shown.value


@pytest.mark.parametrize(
    "settings, times, labels",
    [
        ({}, [0.0, 1.0, 2.02, 2.8], ["0 s", "1 s", "2 s", "3 · 2.8 s"]),
        ({"start_seconds": 10.0}, [10.0, 11.0, 13.5], ["0 · 10 s", "1 · 11 s", "2 ≠ 13.5 s"]),
        ({"frame_numbers": "seconds"}, [0.0, 7.6, 1234.0], ["0 s", "8 · 7.6 s", "1234 s"]),
        ({"template": "vqa"}, [0.0, 7.6], ["0 s", "7.6 s"]),
        ({"template": "of others"}, [0.5], ["0.5 s"]),
        ({}, [0.5 * number for number in range(27)], None),
    ],
)
def test_each_frame_of_a_strip_has_its_time_and_the_models_number_if_that_is_another(tmp_path, settings, times, labels):
    store = capkit.CaptionStore(tmp_path / "captions.jsonl")
    store.strips.mkdir()
    colours = [np.array([9 * place, 250 - 9 * place, 100], np.uint8) for place in range(len(times))]
    strip = draw_strip(np.stack([np.full((224, 224, 3), colour) for colour in colours]))
    (store.strips / "0.webp").write_bytes(strip)
    record = {"video": "a.mp4", "status": "ok", "text": "A star.", "strip": "0.webp", "timestamps_seconds": times}
    html = show_captions(store, [record | settings]).html
    spans = re.findall(r'<span style="position:absolute[^"]*?left:([\d.]+)%;bottom:([\d.]+)%">(.*?)</span>', html)
    assert [text for *_, text in spans] == (labels or ["0 s", "1 ≠ 0.5 s"] + [text for *_, text in spans[2:]])
    assert ("On a frame" in html) == ("start_seconds" in settings or any("≠" in text for *_, text in spans))
    picture = np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")).astype(int)
    height, width, _ = picture.shape
    for (left, bottom, _), colour in zip(spans, colours, strict=True):  # each stands on its own frame
        seen = picture[round(height * (1 - float(bottom) / 100)) - 5, round(width * float(left) / 100) + 5]
        assert np.abs(seen - colour).max() < 12


def test_a_note_beside_the_demo_models_captions_of_clips_that_it_cannot_know(tmp_path, monkeypatch, capsys):
    def draw_noise(number, *_):
        return np.random.default_rng(number).integers(0, 256, (96, 128, 3), np.uint8)

    captioner = capkit.load_captioner("demo", device="cpu")
    clips = [str(encode_clip(tmp_path / "noise.mp4", draw=draw_noise)), str(sorted(DEMO_CLIPS.glob("*.mp4"))[0])]
    store = capkit.CaptionStore(tmp_path / "captions.jsonl")
    far, near = run_sweep(captioner, clips, store, decodings=[{"max_new_tokens": 5}]).records
    assert (store.notice(far), store.notice(near)) == (DEMO_NOTICE, "")
    other = far | {"model": "THUDM/cogvlm2-llama3-caption"}
    failed = far | {"status": "error", "error": "x"}
    assert not any(map(store.notice, (other, failed, far | {"strip": "gone.webp"}, {"text": "of others"})))
    for show in (
        lambda record: show_captions(store, [record]),
        lambda record: compare_captions([record], store=store),
        lambda record: show_caption(record, capkit.load_clip(record["video"])),
    ):
        assert [show(record).html.count(DEMO_NOTICE) for record in (far, near, other)] == [1, 0, 0]
    assert captions_page(store)._repr_html_().count(DEMO_NOTICE) == 1
    panel = Playground(captioner, clips, store, tmp_path)
    for clip, count in zip(clips, (1, 0), strict=True):
        panel.video.value = clip
        (card,) = panel.baseline.children
        assert card.shown.value.count(DEMO_NOTICE) == panel.about_frame.value.count(DEMO_NOTICE) == count
    monkeypatch.setattr(sys, "argv", ["capkit", "show", str(store.path)])
    with pytest.raises(SystemExit):
        capkit.__main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert [place for place, line in enumerate(lines) if DEMO_NOTICE in line] == [lines.index(far["video"]) + 2]
