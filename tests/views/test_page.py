"""The page of captions: what is chosen, where it stands, what it can be filtered by, and what changed."""

import base64
import hashlib
import io
import json
import re
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import capkit
from capkit.sweep import SweepResult, plan_sweep
from capkit.video import STRIP_FRAME_PIXELS
from capkit.views import captions_page, compare_captions, compare_runs, show_captions
from capkit.views.page import STRIP_BYTES

ROW = '<div class="row" role="row">'
NASTY = '<script>alert(1)</script> "quoted" & שלום עולם \u202eback \U0001f31f'


def a_record(number, **fields):
    record = {"request": str(number), "video": f"/clips/{number}.mp4", "strip": f"{number}.webp", "prompt": "What?"}
    record |= {"status": "ok", "error": None, "text": f" Text {number}.", "timestamps_seconds": [0.0, 1.0]}
    return record | {"num_tokens": number, "mean_logprob": -1.0, "finish_reason": "eos", "seconds": 1.0} | fields


def an_error(number, error="the file is empty"):
    nothing = dict.fromkeys(("text", "num_tokens", "mean_logprob", "finish_reason", "seconds", "timestamps_seconds"))
    return a_record(number, status="error", error=error, **nothing)


@pytest.fixture
def make_store(tmp_path):
    def make(*records):
        store = capkit.CaptionStore(tmp_path / "captions.jsonl")
        store.path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return store

    return make


def requests(gallery):
    return [record["request"] for record in gallery.records]


class TestWhatIsChosen:
    def test_by_status_and_length(self, make_store):
        store = make_store(a_record(3), an_error(4), a_record(5), a_record(6))
        assert requests(captions_page(store)) == ["3", "4", "5", "6"]
        assert requests(captions_page(store, status="error")) == ["4"]
        assert requests(captions_page(store, status="ok", min_tokens=5)) == ["5", "6"]
        assert requests(captions_page(store, max_tokens=5)) == ["3", "5"]
        assert requests(captions_page(store, min_tokens=4, max_tokens=5)) == ["5"]
        assert requests(captions_page(store, limit=2)) == ["3", "4"]
        assert requests(captions_page(make_store())) == []

    def test_order_by_any_field_what_lacks_it_last(self, make_store):
        sure = {3: -0.5, 5: -2.0, 6: -1.0}
        store = make_store(an_error(4), *(a_record(number, mean_logprob=value) for number, value in sure.items()))
        assert requests(captions_page(store, order_by="mean_logprob")) == ["5", "6", "3", "4"]
        assert requests(captions_page(store, order_by="mean_logprob", descending=True)) == ["3", "6", "5", "4"]
        assert requests(captions_page(store, order_by="mean_logprob", descending=True, limit=1)) == ["3"]
        store.edit("5", "By hand")
        assert requests(captions_page(store, order_by="edited_text"))[0] == "5"
        settings = make_store(a_record(1, decoding={"top_k": 9}), a_record(2, decoding={"top_k": 1}), a_record(3))
        assert requests(captions_page(settings, order_by="decoding")) == ["2", "1", "3"]
        words = make_store(a_record(1, text="b"), a_record(2, text="A"), a_record(3, text="C"))
        assert requests(captions_page(words, order_by="text")) == ["2", "1", "3"]

    def test_what_was_chosen_is_said(self, make_store, tmp_path):
        store = make_store(a_record(3), a_record(5), an_error(6))
        gallery = captions_page(
            store, status="ok", min_tokens=4, order_by="mean_logprob", descending=True, title="Long ones"
        )
        summary = "1 of 3 captions in captions.jsonl; status ok; at least 4 tokens; by mean_logprob, largest first"
        page = gallery.save(tmp_path / "deep" / "gallery.html").read_text()
        assert summary in page and summary in gallery._repr_html_() and "mean_logprob: -1.0" in page
        assert "<h1>Long ones</h1>" in page and "Text 5." in page and "Text 3." not in page

    def test_wrong_choices_are_named(self, make_store):
        store = make_store(a_record(3))
        with pytest.raises(ValueError, match="status='fine': must be 'ok', 'error'"):
            captions_page(store, status="fine")
        with pytest.raises(ValueError, match="order_by='lenght': no record has it; there are request, video"):
            captions_page(store, order_by="lenght")
        with pytest.raises(ValueError, match="limit=0"):
            captions_page(store, limit=0)


class TestThePage:
    def test_errors_in_words_and_hand_edits_before_the_models_text(self, make_store, tmp_path):
        store = make_store(a_record(3), an_error(4), a_record(5))
        store.edit("5", "Written by hand.")
        page = captions_page(store).save(tmp_path / "gallery.html").read_text()
        first, failed, edited = page.split('<div class="caption')[1:]
        assert "not captioned: the file is empty" in failed and "None" not in failed
        assert "edited by hand" in edited and edited.index("Written by hand.") < edited.index("the model's caption")
        assert edited.index("the model's caption") < edited.index("Text 5.")
        assert "edited by hand" not in first + failed

    def test_whatever_is_said_is_text(self, make_store, tmp_path):
        name = "a \"b\" '<i>' שלום \u202e\U0001f31f.mp4"
        store = make_store(a_record(1, text=NASTY, prompt=NASTY, video=f"/x/{name}", finish_reason=NASTY))
        store.append(an_error(2, error=NASTY) | {"video": f"/x/{name}"})
        store.edit("1", NASTY)
        gallery = captions_page(store, order_by="finish_reason", title=NASTY)
        page = gallery.save(tmp_path / "gallery.html").read_text(encoding="utf-8")
        for html in (page, gallery._repr_html_()):
            assert not re.search('<script>alert|<i>|https?:|<link|@import| src="(?!data:)', html)
            name, said = (text.replace("\u202e", r"\u202e") for text in (name, NASTY))  # seen, and without effect
            assert f"<bdi>{name}</bdi>" in unescape(html) and said in unescape(html)
        assert "default-src 'none'" in page and page.count('charset="utf-8"') == 1

    def test_strips_that_are_missing_or_damaged_are_left_out(self, make_store, tmp_path):
        store = make_store(a_record(1), a_record(2), a_record(3))
        store.strips.mkdir()
        Image.new("RGB", (224, 112), "navy").save(store.strip_path(a_record(1)))
        store.strip_path(a_record(2)).write_bytes(b"RIFF torn")
        page = captions_page(store).save(tmp_path / "gallery.html").read_text()
        assert page.count("data:image/webp;base64,") == 1 and page.count(ROW) == 3
        assert page.count("no picture: ") == 2 and "2.webp is not a WebP picture" in page and "3.webp: No such" in page

    def test_a_strip_that_names_another_file_is_not_embedded(self, make_store, tmp_path):
        (tmp_path / "secret.webp").write_text("a secret")
        named = [a_record(1) | {"strip": name} for name in ("../secret.webp", str(tmp_path / "secret.webp"), "")]
        store = make_store(*({**record, "request": str(n)} for n, record in enumerate(named)))
        for html in (captions_page(store)._repr_html_(), show_captions(store, store.current()).html):
            assert html.count("is not the name of a picture strip") == 3 and "base64" not in html

    def test_a_clip_that_was_never_read_misses_no_picture(self, make_store):
        assert "no picture" not in captions_page(make_store(an_error(1)))._repr_html_()

    def test_a_notebook_shows_the_first_few(self, make_store):
        html = captions_page(make_store(*map(a_record, range(25))))._repr_html_()
        assert "Text 19." in html and "Text 20." not in html and "5 more on the full page" in html
        assert "more on" not in captions_page(make_store(*map(a_record, range(20))))._repr_html_()

    def test_captions_take_at_most_45_kb_each(self, make_store, tmp_path):
        """Long captions, and strips half again as large as may be."""
        store = make_store(*(a_record(number, text="The video shows a room. " * 40) for number in range(250)))
        store.strips.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (STRIP_FRAME_PIXELS, 5 * STRIP_FRAME_PIXELS, 3), np.uint8)
        Image.fromarray(noise).save(store.strips / "0.webp", quality=55)
        data = (store.strips / "0.webp").read_bytes()
        assert len(data) > 1.3 * STRIP_BYTES
        for number in range(250):
            (store.strips / f"{number}.webp").write_bytes(data)
        page = captions_page(store).save(tmp_path / "gallery.html")
        assert 2.5e6 < page.stat().st_size < 250 * 45e3
        html = page.read_text()
        assert html.count("data:image/webp;base64,") == html.count(ROW) == 250
        assert "content-visibility: auto" in html

    def test_more_than_a_thousand_are_on_several_pages_that_lead_to_each_other(self, make_store, tmp_path):
        first = tmp_path / "out" / "my gallery.html"
        gallery = captions_page(make_store(*map(a_record, range(2500))), order_by="num_tokens", descending=True)
        assert gallery.save(first) == first and len(gallery.records) == 2500
        pages = ["my gallery.html", "my gallery.page2.html", "my gallery.page3.html"]
        assert sorted(path.name for path in first.parent.iterdir()) == pages
        texts = []
        for number, name in enumerate(pages):
            html = (first.parent / name).read_text()
            texts += re.findall(r"Text \d+", html)
            links = re.findall(r'<a href="([^"]+)">(\w+)</a>', html)
            assert len(links) == 2 * (2 if number != 1 else 4) and f"page {number + 1} of 3" in html
            by_name = {name: unquote(target) for target, name in links}
            assert by_name.get("next") == (pages[number + 1] if number < 2 else None)
            assert by_name.get("previous") == (pages[number - 1] if number else None)
        assert texts == [f"Text {number}" for number in reversed(range(2500))]
        captions_page(make_store(*map(a_record, range(1000)))).save(first)
        assert [path.name for path in first.parent.iterdir()] == pages[:1] and "<a href" not in first.read_text()


SETTINGS = {"frame_sampling": {"strategy": "chat", "num_frames": 24, "frames_per_second": None}, "sample": 0}
SETTINGS |= {"template": "chat", "frame_numbers": "index", "history": [], "quantization": None, "dtype": "float32"}
SETTINGS |= {"decoding": {"max_new_tokens": 2048}, "model": "demo", "model_fingerprint": "f0"}
SETTINGS |= {"start_seconds": 0.0, "end_seconds": None}


def a_request(clip, text=" A dog runs.", **fields):
    """A record with all settings, by the name of its clip."""
    name = json.dumps([clip, text, fields], sort_keys=True)
    return a_record(0, request=name, video=f"/clips/{clip}.mp4", text=text) | SETTINGS | fields


def cells(page):
    """Of each row of a page's HTML: its name, and the texts of each of its cells."""
    rows = []
    for row in page.split("<main")[1].split("</main>")[0].split(ROW)[1:]:
        head, *rest = re.split(r'<div class="cell c\d+[ a-z]*" role="cell">', row)
        name = " ".join(text_of(head.split("<img")[0].split("no picture")[0]).split())
        rows.append((name, *([text_of(text) for text in re.findall("<p[^>]*>(.*?)</p>", cell, re.S)] for cell in rest)))
    return rows


def text_of(html):
    return unescape(re.sub("<[^>]*>", "", html))


def headings(page):
    found = re.findall(r'<div class="cell c\d+" role="columnheader"><b dir="auto">(.*?)</b>(.*?)<details>', page)
    return [unescape(name) + (" (baseline)" if mark else "") for name, mark in found]


def columns(page):
    (data,) = re.findall('<script type="application/json" id="columns">(.*?)</script>', page)
    return json.loads(data)["columns"]


def saved(page, tmp_path):
    return page.save(tmp_path / "page.html").read_text(encoding="utf-8")


class TestMatrix:
    def test_settings_that_differ_are_the_cells(self, make_store, tmp_path):
        warm = {"decoding": {"max_new_tokens": 2048, "temperature": 0.8, "seed": 0}}
        other = {"decoding": {"max_new_tokens": 2048, "temperature": 0.8, "seed": 77}, "sample": 1}
        store = make_store(
            a_request("a", " A dog runs."),
            a_request("a", " A dog sits.", **warm),
            a_request("a", " A cat runs.", **other),
            a_request("b", " A car."),
            a_request("a", " Dog, bone.", prompt="List."),
            a_request("b", " Car, road.", prompt="List."),
        )
        page = saved(captions_page(store), tmp_path)
        assert headings(page) == ["What? · greedy (baseline)", "What? · temperature=0.8", "List. · greedy"]
        assert cells(page) == [
            ("a.mp4", ["A dog runs."], ["A dog sits.", "A cat runs."], ["Dog, bone."]),
            ("b.mp4", ["A car."], ["no caption"], ["Car, road."]),
        ]
        assert "2 clips × 3 cells" in page and "sample 1" in page
        assert (
            headings(saved(captions_page(store, baseline="List. · greedy"), tmp_path))[2] == "List. · greedy (baseline)"
        )
        with pytest.raises(ValueError, match="unknown cell 'List.'; .*there are: What"):
            captions_page(store, baseline="List.")

    def test_words_are_compared_with_the_baseline(self, make_store, tmp_path):
        store = make_store(
            a_request("a", " A red\n  dog runs."),
            a_request("a", " A blue\n  dog runs.", prompt="Why?"),
            a_request("a", None, prompt="Who?", status="error", error="it is empty"),
        )
        page = saved(captions_page(store), tmp_path)
        assert re.findall("<u>(.*?)</u>", page) == ["red", "blue"]
        assert columns(page)["words that differ"] == [None, 1, 0]
        assert [texts for _, *texts in cells(page)] == [
            [["A red\n  dog runs."], ["A blue\n  dog runs."], ["not captioned: it is empty"]]
        ]
        page = saved(captions_page(store, baseline="Who?"), tmp_path)
        assert "<u>" not in page and headings(page)[2] == "Who? (baseline)"  # an error has no words to compare with

    def test_a_prompt_for_each_clip_is_a_row_for_each_caption(self, make_store, tmp_path):
        records = [a_request(number, f" Text {number}.", prompt=f"Say {number}.") for number in range(70)]
        page = saved(captions_page(make_store(*records)), tmp_path)
        assert cells(page) == [(f"{number}.mp4 Say {number}.", [f"Text {number}."]) for number in range(70)]
        assert headings(page) == ["caption"]

    def test_windows_are_clips_of_their_own(self, make_store, tmp_path):
        parts = [
            a_request("a", f" Part {start}.", start_seconds=start, end_seconds=start + 2.0) for start in (0.0, 2.0)
        ]
        page = saved(captions_page(make_store(*parts)), tmp_path)
        assert [(name.split(" What?")[0], *rest) for name, *rest in cells(page)] == [
            ("a.mp4, 0 to 2 s", ["Part 0.0."]),
            ("a.mp4, 2 to 4 s", ["Part 2.0."]),
        ]

    def test_rows_begin_with_the_first_in_order(self, make_store, tmp_path):
        sure = {("a", "What?"): -3.0, ("a", "Why?"): -0.5, ("b", "What?"): -1.0, ("b", "Why?"): -9.0}
        records = [
            a_request(clip, f" {value}", prompt=prompt, mean_logprob=value) for (clip, prompt), value in sure.items()
        ]
        page = saved(captions_page(make_store(*records), order_by="mean_logprob"), tmp_path)
        assert cells(page) == [("b.mp4", ["-1.0"], ["-9.0"]), ("a.mp4", ["-3.0"], ["-0.5"])]

    def test_a_sweep_has_its_own_cells_and_captions_made_elsewhere(self, tmp_path):
        plan = plan_sweep(["/clips/a.mp4", "/clips/b.mp4", "/clips/a.mp4"], ["sentence", "objects"])
        asked = [(clip, cell.prompt.text) for clip in "aba" for cell in plan.cells]
        records = [a_request(clip, f" {clip} {text[0]}", prompt=text) for clip, text in asked]
        result = SweepResult(plan, records, {"other tool": [a_request("b", " by others", request=None)]})
        table = result.to_frame().assign(support=[0.5, float("nan"), 2.0, 3.0, 0.5, float("nan"), None], is_long=True)
        page = saved(captions_page(result, columns=table, title="All"), tmp_path)
        assert headings(page) == ["sentence (baseline)", "objects", "other tool"]
        assert cells(page) == [
            ("a.mp4", ["a D"], ["a L"], ["no caption"]),
            ("b.mp4", ["b D"], ["b L"], ["by others"]),
        ]
        assert columns(page)["support"] == [0.5, None, 2.0, 3.0, None]
        assert "is_long" not in columns(page)  # all alike: nothing to filter by
        with pytest.raises(ValueError, match="columns: 2 rows for 7 records"):
            captions_page(result, columns=table[:2])

    def test_fields_that_others_add_are_shown_and_columns(self, make_store, tmp_path):
        marks = {"mark": "wrong", "wrong_words": ["dog", "<b>"], "remark": "it is a cat"}
        store = make_store(a_request("a", mark="right"), a_request("b", **marks), a_request("c"))
        page = saved(captions_page(store), tmp_path)
        assert "marked wrong (dog, &lt;b&gt;): it is a cat" in page
        found = columns(page)
        assert found["mark"] == ["right", "wrong", None] and found["wrong_words"] == [None, "dog, <b>", None]
        assert found["clip"] == ["a.mp4", "b.mp4", "c.mp4"] and "model" not in found

    def test_an_edit_of_a_clip_that_failed_is_shown_with_the_error(self, make_store, tmp_path):
        store = make_store(a_request("a", None, status="error", error="it is empty"), a_request("b", " By the model."))
        for record in store.current():
            store.edit(record["request"], "By hand.")
        page = saved(captions_page(store), tmp_path)
        failed, edited = (texts for _, texts in cells(page))
        assert failed == ["By hand.", "not captioned: it is empty"] and edited == ["By hand.", "By the model."]
        assert "edited" not in columns(page) and page.count("✎ edited by hand") == 2

    def test_scripts_run_only_if_they_are_the_pages_own(self, make_store, tmp_path):
        said = "</script><script>alert(1)</script>\0\u202e"
        page = saved(captions_page(make_store(a_request("a", said, mark=said), a_request("b"))), tmp_path)
        (policy,) = re.findall('Content-Security-Policy" content="(.*?)"', page)
        (script,) = re.findall("<script>(.*?)</script>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy.split("; ")[0] == "default-src 'none'" and f"script-src 'sha256-{digest}'" in policy
        assert "\0" not in page and "\u202e" not in page and page.count("<script") == 2
        assert columns(page)["mark"] == [r"</script><script>alert(1)</script>\x00\u202e", None]

    def test_the_notebook_shows_the_first_clips(self, make_store):
        records = [a_request(n, f" Clip {n}, {p}", prompt=p) for n in range(7) for p in ("Why?", "Who?")]
        html = captions_page(make_store(*records), baseline="Who?")._repr_html_()
        assert "<u " in html
        html = re.sub("</?u[^>]*>", "", html)
        assert "Clip 4, Why?" in html and "Clip 5" not in html and "2 more on the full page" in html
        assert (
            "<script" not in html and "<style" not in html and html.index("Clip 0, Who?") < html.index("Clip 0, Why?")
        )


class TestWhatChanged:
    def test_added_removed_changed_and_same(self, tmp_path):
        old = [a_request(name, f" {name} dog.") for name in "abcd"]
        old.append(a_request("e", None, status="error", error="it is empty"))
        later = {"model": "other", "model_fingerprint": "f1", "dtype": "bfloat16", "mean_logprob": -9.0}
        new = [a_request(name, f" {name} dog.", **later) for name in "dba"]
        new[1]["text"] = " b cat."
        new += [a_request("e", " e dog.", **later), a_request("f", " f dog.", **later)]
        page = compare_runs(old, new)
        html = saved(page, tmp_path)
        assert page.summary.startswith("2 changed; 1 added; 1 removed; 2 same")
        assert "the runs differ in model: demo → other" in page.summary and "dtype: float32 → bfloat16" in page.summary
        assert headings(html) == ["old (baseline)", "new"]
        assert cells(html) == [
            ("b.mp4", ["b dog."], ["b cat."]),
            ("e.mp4", ["not captioned: it is empty"], ["e dog."]),
            ("f.mp4", ["no caption"], ["f dog."]),
            ("c.mp4", ["c dog."], ["no caption"]),
            ("a.mp4", ["a dog."], ["a dog."]),
            ("d.mp4", ["d dog."], ["d dog."]),
        ]
        assert columns(html)["change"] == ["changed"] * 4 + ["added", "removed"] + ["same"] * 4
        assert re.findall("<u>(.*?)</u>", html) == ["dog.", "cat."]

    def test_a_setting_of_the_run_does_not_keep_captions_apart(self, tmp_path):
        old = [a_request(n, prompt=p, template="chat") for n in "ab" for p in ("Why?", "Who?")]
        new = [a_request(n, prompt=p, template="vqa") for n in "ab" for p in ("Who?", "Why?")]
        page = compare_runs(old, new)
        assert page.summary == "0 changed; 0 added; 0 removed; 4 same; the runs differ in template: chat → vqa"
        names = [name for name, *_ in cells(saved(page, tmp_path))]
        assert names == ["a.mp4 Why?", "a.mp4 Who?", "b.mp4 Why?", "b.mp4 Who?"]
        new = [record | {"prompt": "When?"} for record in new if record["prompt"] == "Why?"]  # of old, one of two
        assert "0 same" in compare_runs(old, new).summary and "4 removed" in compare_runs(old, new).summary

    def test_repeats_are_paired_by_their_number_and_edits_count(self):
        old = [a_request("a", f" {n}", sample=n, decoding={"temperature": 1.0, "seed": n}) for n in range(3)]
        new = [
            record | {"text": record["text"] + "!"} if record["sample"] == 2 else dict(record) for record in old[::-1]
        ]
        assert compare_runs(old, new).summary == "1 changed; 0 added; 0 removed; 2 same"
        new[0]["edited_text"] = "2"
        assert compare_runs(old, new).summary == "0 changed; 0 added; 0 removed; 3 same"

    def test_folders_that_moved_are_matched_by_file_name(self):
        old = [a_request(name) for name in "abc"]
        new = [record | {"video": record["video"].replace("/clips", "/mnt/clips")} for record in old[1:]]
        summary = "0 changed; 0 added; 1 removed; 2 same; the folders differ: clips are matched by file name"
        assert compare_runs(old, new).summary == summary
        assert "matched by file name" not in compare_runs(old, [a_request("a")]).summary

    def test_empty_runs(self, make_store, tmp_path):
        assert compare_runs(make_store(), make_store()).summary == "0 changed; 0 added; 0 removed; 0 same"
        assert compare_runs([], [a_request("a")]).summary == "0 changed; 1 added; 0 removed; 0 same"
        assert cells(saved(compare_runs([a_request("a")], []), tmp_path)) == [
            ("a.mp4", ["A dog runs."], ["no caption"])
        ]

    def test_each_run_has_its_own_pictures(self, tmp_path):
        stores = []
        for name, colour in (("old", "navy"), ("new", "maroon")):
            store = capkit.CaptionStore(tmp_path / name / "captions.jsonl")
            store.append(a_request("a", strip=f"{name}.webp"))
            store.strips.mkdir()
            Image.new("RGB", (224, 112), colour).save(store.strips / f"{name}.webp")
            stores.append(store)
        (data,) = re.findall('data:image/webp;base64,([^"]*)', saved(compare_runs(*stores), tmp_path))
        red, _, blue = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((50, 50))
        assert red > 100 > blue  # the new one's


def test_names_of_captions_are_the_settings_that_differ():
    records = [
        a_request("a", decoding={"max_new_tokens": n, **more}) for n, more in ((9, {}), (9, {"temperature": 0.5}))
    ]
    html = compare_captions([*records, records[0] | {"quantization": "4bit"}]).html
    names = re.findall('<b dir="auto">(.*?)</b>', html)
    assert names == ["greedy", "temperature=0.5", "greedy · quantization=4bit"]
