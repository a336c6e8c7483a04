"""The gallery: what is chosen, in which order, and that one file holds it all."""

import json
import re
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import capkit
from capkit.video import STRIP_FRAME_PIXELS
from capkit.views import show_captions, write_gallery
from capkit.views.gallery import STRIP_BYTES

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
        assert requests(write_gallery(store)) == ["3", "4", "5", "6"]
        assert requests(write_gallery(store, status="error")) == ["4"]
        assert requests(write_gallery(store, status="ok", min_tokens=5)) == ["5", "6"]
        assert requests(write_gallery(store, max_tokens=5)) == ["3", "5"]
        assert requests(write_gallery(store, min_tokens=4, max_tokens=5)) == ["5"]
        assert requests(write_gallery(store, limit=2)) == ["3", "4"]
        assert requests(write_gallery(make_store())) == []

    def test_order_by_any_field_what_lacks_it_last(self, make_store):
        sure = {3: -0.5, 5: -2.0, 6: -1.0}
        store = make_store(an_error(4), *(a_record(number, mean_logprob=value) for number, value in sure.items()))
        assert requests(write_gallery(store, order_by="mean_logprob")) == ["5", "6", "3", "4"]
        assert requests(write_gallery(store, order_by="mean_logprob", descending=True)) == ["3", "6", "5", "4"]
        assert requests(write_gallery(store, order_by="mean_logprob", descending=True, limit=1)) == ["3"]
        store.edit("5", "By hand")
        assert requests(write_gallery(store, order_by="edited_text"))[0] == "5"
        settings = make_store(a_record(1, decoding={"top_k": 9}), a_record(2, decoding={"top_k": 1}), a_record(3))
        assert requests(write_gallery(settings, order_by="decoding")) == ["2", "1", "3"]
        words = make_store(a_record(1, text="b"), a_record(2, text="A"), a_record(3, text="C"))
        assert requests(write_gallery(words, order_by="text")) == ["2", "1", "3"]

    def test_what_was_chosen_is_said(self, make_store, tmp_path):
        store = make_store(a_record(3), a_record(5), an_error(6))
        gallery = write_gallery(
            store, status="ok", min_tokens=4, order_by="mean_logprob", descending=True, title="Long ones"
        )
        summary = "1 of 3 captions in captions.jsonl; status ok; at least 4 tokens; by mean_logprob, largest first"
        page = gallery.save(tmp_path / "deep" / "gallery.html").read_text()
        assert summary in page and summary in gallery._repr_html_() and "mean_logprob -1.0" in page
        assert "<h1>Long ones</h1>" in page and "Text 5." in page and "Text 3." not in page

    def test_wrong_choices_are_named(self, make_store):
        store = make_store(a_record(3))
        with pytest.raises(ValueError, match="status='fine': must be 'ok', 'error'"):
            write_gallery(store, status="fine")
        with pytest.raises(ValueError, match="order_by='lenght': no record has it; there are request, video"):
            write_gallery(store, order_by="lenght")
        with pytest.raises(ValueError, match="limit=0"):
            write_gallery(store, limit=0)


class TestThePage:
    def test_errors_in_words_and_hand_edits_before_the_models_text(self, make_store, tmp_path):
        store = make_store(a_record(3), an_error(4), a_record(5))
        store.edit("5", "Written by hand.")
        page = write_gallery(store).save(tmp_path / "gallery.html").read_text()
        first, failed, edited = page.split("<article>")[1:]
        assert "not captioned: the file is empty" in failed and "None" not in failed
        assert "edited by hand" in edited and edited.index("Written by hand.") < edited.index("the model's caption")
        assert edited.index("the model's caption") < edited.index("Text 5.")
        assert "edited by hand" not in first + failed

    def test_whatever_is_said_is_text(self, make_store, tmp_path):
        name = "a \"b\" '<i>' שלום \u202e\U0001f31f.mp4"
        store = make_store(a_record(1, text=NASTY, prompt=NASTY, video=f"/x/{name}", finish_reason=NASTY))
        store.append(an_error(2, error=NASTY) | {"video": f"/x/{name}"})
        store.edit("1", NASTY)
        gallery = write_gallery(store, order_by="finish_reason", title=NASTY)
        page = gallery.save(tmp_path / "gallery.html").read_text(encoding="utf-8")
        for html in (page, gallery._repr_html_()):
            assert not re.search('<script|<i>|https?:|<link|@import| src="(?!data:)', html)
            name, said = (text.replace("\u202e", r"\u202e") for text in (name, NASTY))  # seen, and without effect
            assert f"<bdi>{name}</bdi>" in unescape(html) and said in unescape(html)
        assert "default-src 'none'" in page and page.count('charset="utf-8"') == 1

    def test_strips_that_are_missing_or_damaged_are_left_out(self, make_store, tmp_path):
        store = make_store(a_record(1), a_record(2), a_record(3))
        store.strips.mkdir()
        Image.new("RGB", (224, 112), "navy").save(store.strip_path(a_record(1)))
        store.strip_path(a_record(2)).write_bytes(b"RIFF torn")
        page = write_gallery(store).save(tmp_path / "gallery.html").read_text()
        assert page.count("data:image/webp;base64,") == 1 and page.count("<article>") == 3
        assert page.count("no picture: ") == 2 and "2.webp is not a WebP picture" in page and "3.webp: No such" in page

    def test_a_strip_that_names_another_file_is_not_embedded(self, make_store, tmp_path):
        (tmp_path / "secret.webp").write_text("a secret")
        named = [a_record(1) | {"strip": name} for name in ("../secret.webp", str(tmp_path / "secret.webp"), "")]
        store = make_store(*({**record, "request": str(n)} for n, record in enumerate(named)))
        for html in (write_gallery(store)._repr_html_(), show_captions(store, store.current()).html):
            assert html.count("is not the name of a picture strip") == 3 and "base64" not in html

    def test_a_clip_that_was_never_read_misses_no_picture(self, make_store):
        assert "no picture" not in write_gallery(make_store(an_error(1)))._repr_html_()

    def test_a_notebook_shows_the_first_few(self, make_store):
        html = write_gallery(make_store(*map(a_record, range(25))))._repr_html_()
        assert "Text 19." in html and "Text 20." not in html and "5 more on the full page" in html
        assert "more on" not in write_gallery(make_store(*map(a_record, range(20))))._repr_html_()

    def test_a_thousand_captions_stay_under_30_mb(self, make_store, tmp_path):
        """Long captions, and strips half again as large as may be."""
        store = make_store(*(a_record(number, text="The video shows a room. " * 40) for number in range(1000)))
        store.strips.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (STRIP_FRAME_PIXELS, 5 * STRIP_FRAME_PIXELS, 3), np.uint8)
        Image.fromarray(noise).save(store.strips / "0.webp", quality=55)
        data = (store.strips / "0.webp").read_bytes()
        assert len(data) > 1.3 * STRIP_BYTES
        for number in range(1000):
            (store.strips / f"{number}.webp").write_bytes(data)
        page = write_gallery(store).save(tmp_path / "gallery.html")
        assert 10e6 < page.stat().st_size < 30e6
        html = page.read_text()
        assert html.count("data:image/webp;base64,") == html.count("<article>") == 1000
        assert "content-visibility: auto" in html

    def test_more_than_a_thousand_are_on_several_pages_that_lead_to_each_other(self, make_store, tmp_path):
        first = tmp_path / "out" / "my gallery.html"
        gallery = write_gallery(make_store(*map(a_record, range(2500))), order_by="num_tokens", descending=True)
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
        write_gallery(make_store(*map(a_record, range(1000)))).save(first)
        assert [path.name for path in first.parent.iterdir()] == pages[:1] and "<a href" not in first.read_text()
