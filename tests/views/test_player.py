"""The clip itself beside its frames: played where a browser can, and said where it cannot."""

import base64
import re
import shutil

import pytest
from video_factory import encode_clip

import capkit
from capkit.runs.clips import DEMO_CLIPS
from capkit.views import clip_player, show_caption, show_captions, show_clip

CLIP = DEMO_CLIPS / "green_cross_grows.mp4"


def played(html):
    """The content of the players in a piece of HTML."""
    return [base64.b64decode(data) for data in re.findall(r'src="data:video/mp4;base64,([^"]+)"', html)]


def test_a_clip_is_played_beside_its_frames():
    clip = capkit.load_clip(CLIP)
    for html in (clip_player(clip), show_clip(clip).html, show_caption("A cross.", clip).html):
        assert played(html) == [CLIP.read_bytes()] and "<video controls" in html and "<script" not in html
    assert clip_player(capkit.Clip.from_frames(clip.frames)) == ""


def test_a_large_file_is_a_link(tmp_path):
    path = tmp_path / "a <b> & c.mp4"
    large = 21_000_000
    path.write_bytes(CLIP.read_bytes() + large.to_bytes(4, "big") + b"free" + bytes(large - 8))
    clip = capkit.load_clip(path)
    html = clip_player(clip)
    assert "<video" not in html and f'href="{path.as_uri()}"' in html and "21 MB" in html and "a &lt;b&gt;" in html
    assert 'href="/lab/files/c.mp4"' in clip_player(clip, "/lab/files/c.mp4")
    path.unlink()
    assert clip_player(clip) == ""  # of a store from elsewhere


@pytest.mark.parametrize(
    ("name", "codec", "named"),
    [("a.mp4", "mpeg4", "mpeg4"), ("a.avi", "libx264", ".avi"), ("a.mkv", "libx265", "hevc")],
)
def test_what_browsers_cannot_play_is_said(tmp_path, name, codec, named):
    clip = capkit.load_clip(encode_clip(tmp_path / name, codec=codec))
    assert f"few browsers play {named}" in clip_player(clip) and "<video" not in clip_player(clip)


def test_cards_play_each_clip_once_and_no_more_than_a_page_should_hold(tmp_path):
    clips = [shutil.copy(CLIP, tmp_path / name) for name in ("a.mp4", "b.mp4", "c.mp4")]
    with open(clips[1], "ab") as file:
        file.write((4_000_000).to_bytes(4, "big") + b"free" + bytes(4_000_000 - 8))
    store = capkit.CaptionStore(tmp_path / "captions.jsonl")
    axes = {"prompts": ["default", "sentence"], "decodings": [{"max_new_tokens": 2}]}
    records = capkit.run_sweep(capkit.load_captioner("demo", device="cpu"), clips, store, **axes).records
    html = show_captions(store, records).html
    assert played(html) == [CLIP.read_bytes()] * 2 and html.count("4 MB, too large") == 1
