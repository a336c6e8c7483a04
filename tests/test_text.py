"""Nothing that others wrote drives a terminal or a page; all letters stay as they are."""

import json
import re
import sys
import unicodedata
import warnings

import pandas as pd
import pytest

import capkit.__main__
from capkit import CaptionStore, plan_sweep
from capkit.batch import run_command
from capkit.playground import browse
from capkit.runs import DEMO_CLIPS, Progress, find_clips, merge, new_record
from capkit.text import CapkitWarning, escape, plain_text, show_warnings_plainly, warn, without_controls
from capkit.views import captions_page, compare_captions, show_captions

# Sets the title, writes the clipboard, hides a link, rings, goes back in the line, reorders, forges a line.
ATTACKS = ["\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x07", "\x1b]8;;http://x\x1b\\", "\x9b31m", "\a", "\b\b", "\r"]
ATTACKS += ["\u202egnp.exe", "\u2066", "\u2069", "\u202a\u202b\u202c\u202d", "\ncapkit: all is well", "\v\f"]
ATTACKS += ["\u2028", "\u2029", "\x85", "\0", "\x7f", "\udcff", "\ud800"]
LETTERS = "Ünïcödé שלום مرحبا\u200f नमस्ते क्\u200dष می\u200cخواهم 漢字\u3000かな 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ a\u00a0b \\ \"'"
EVIL = "".join(ATTACKS)
NAME = EVIL.replace("\0", "")  # no file has a NUL in its name
SAID = EVIL.removesuffix("\udcff\ud800")  # texts of prompts and captions have no lone surrogates
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def test_every_character_is_a_control_and_seen_or_stays():
    """Against Unicode's own categories: controls, surrogates, line and paragraph separators, and bidi formatting."""
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        is_control = (
            unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in bidi
        )
        shown = plain_text(letter)
        assert (shown != letter) == is_control
        if is_control:
            assert shown.isascii() and shown.isprintable() and eval(f'"{shown}"') == letter


def test_letters_of_all_scripts_stay():
    assert plain_text(LETTERS) == LETTERS
    assert escape(LETTERS) == LETTERS.replace('"', "&quot;").replace("'", "&#x27;")


def test_html_keeps_white_space_and_escapes_markup():
    assert escape("<a>\n\tb & c\r\n") == "&lt;a&gt;\n\tb &amp; c\r\n"
    assert escape("\x1b[31m\u202e") == "\\x1b[31m\\u202e" and without_controls("<b>\0</b>") == "<b>\\x00</b>"


@pytest.fixture
def evil_store(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    record = dict.fromkeys(("end_seconds", "num_tokens", "mean_logprob", "seconds", "duration_seconds"))
    record |= {"video": f"/clips/{NAME}{LETTERS}.mp4", "prompt": EVIL, "strip": NAME, "finish_reason": EVIL}
    record |= {"template": "chat", "decoding": {}, "video_notes": [EVIL], "timestamps_seconds": [], EVIL: EVIL}
    store.append(record | {"request": "a", "status": "ok", "error": None, "text": f"A dog\n{SAID} {LETTERS}"})
    store.append(record | {"request": "b", "status": "error", "error": EVIL, "text": None})
    return store


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["capkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        capkit.__main__.main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


class TestTerminal:
    def test_show(self, evil_store, monkeypatch, capsys):
        code, printed = run(monkeypatch, capsys, "show", evil_store.path)
        assert code == 0 and not FORBIDDEN.search(printed)
        assert LETTERS in printed and r"\x1b]52;c;ZXZpbA==\x07" in printed and "  A dog " in printed
        assert not any(line.startswith("capkit: all is well") for line in printed.splitlines())

    def test_progress(self, evil_store, capsys):
        with Progress(("clip", "caption"), 1, 0) as progress:
            progress.update(evil_store.lines()[1])
        printed = "".join(capsys.readouterr())
        assert r"error: \x1b]0;title" in printed and not FORBIDDEN.search(printed)
        assert "1 clip to caption" in printed and "1/1 clip, 1 error, 0.0 captioned a minute" in printed
        assert not any(line.startswith("capkit: all is well") for line in printed.splitlines())

    def test_problems_of_merge(self, tmp_path, monkeypatch, capsys):
        plan = {"num_shards": 1, "items": "x", "written": "1", "settings": {}, "shard": 0, "clips": [["a", EVIL]]}
        (tmp_path / "shard-00000-of-00001.plan.json").write_text(json.dumps(plan))
        code, printed = run(monkeypatch, capsys, "merge", tmp_path)
        assert code == 1 and r"no record of \x1b]0;title" in printed and not FORBIDDEN.search(printed)
        assert len(printed.splitlines()) == 2 == len(str(merge(tmp_path)).splitlines())

    def test_errors_and_warnings(self, tmp_path, monkeypatch, capsys):
        name = f"{NAME}.jsonl".replace("\ud800", "").replace("/", "")
        (tmp_path / name).write_text('{"clip": 1}\n')
        code, printed = run(monkeypatch, capsys, "caption-shard", tmp_path / name, "--output", tmp_path / "out")
        assert code == 2 and "has no column 'video'" in printed and not FORBIDDEN.search(printed)
        assert len(printed.splitlines()) == 1
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        show_warnings_plainly()
        with pytest.warns(CapkitWarning) as warned:
            warn(EVIL)
        message = warnings.formatwarning(warned[0].message, warned[0].category, "/tmp/ipykernel_1/2.py", 7)
        assert message.startswith("capkit: ") and "ipykernel" not in message
        assert "other.py:7: UserWarning" in warnings.formatwarning("A library's", UserWarning, "other.py", 7)
        assert message.endswith("\n") and not FORBIDDEN.search(message) and message.count("\n") == 1
        row = {"video": str(DEMO_CLIPS / "camera_pans_right.mp4"), "\x1b[31m": 1, "\u202e": 2}
        (tmp_path / "columns.jsonl").write_text(json.dumps(row))
        with pytest.warns(UserWarning) as warned:
            find_clips(tmp_path / "columns.jsonl")
        assert "ignored columns" in str(warned[0].message) and not FORBIDDEN.search(str(warned[0].message))

    def test_batch_tables(self, tmp_path, capsys):
        (tmp_path / "runs.yaml").write_text(json.dumps({"runs": [{"notebook": EVIL, EVIL: 1}], EVIL[:9]: 2}))
        assert run_command(tmp_path / "runs.yaml") == 2
        printed = "".join(capsys.readouterr())
        assert "unknown key" in printed and not FORBIDDEN.search(printed)
        assert not any(line.startswith("capkit: all is well") for line in printed.splitlines())

    def test_a_plan(self):
        axes = {"templates": ["chat", "vqa"], "frame_numbers": ["index", "seconds"]}
        plan = plan_sweep(find_clips("demo", limit=1), prompts=[SAID], **axes)
        assert "left out" in str(plan) and not FORBIDDEN.search(str(plan))


def test_pages(evil_store, tmp_path):
    records = evil_store.current()
    gallery = captions_page(evil_store, order_by=EVIL, title=EVIL)
    table = pd.DataFrame({"a\x1b[31m": ["\u202egnp", "\0 שלום"]})
    views = [show_captions(evil_store, records), gallery, compare_captions(records, [EVIL, EVIL]), browse(table)]
    pages = [gallery.save(tmp_path / "gallery.html").read_text(encoding="utf-8"), *(v._repr_html_() for v in views)]
    for page in pages:
        assert not FORBIDDEN.search(page.replace("\r", "")) and r"\x1b" in page and "שלום" in page
    assert all(escape(LETTERS) in page for page in pages[:4])


def test_a_record_keeps_what_was_said(evil_store):
    assert evil_store.current()[0]["text"] == f"A dog\n{SAID} {LETTERS}"
    assert new_record({"video": "x"}, ValueError(EVIL))["error"] == EVIL
