"""Clips, captions and sweeps as the last line of a notebook's cell, shown by IPython."""

import json
import subprocess
import sys

from capkit.runs import DEMO_CLIPS

CELL = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
import capkit

before = [name for name in ("torch", "matplotlib", "capkit.views") if name in sys.modules]
video = sys.argv[1]
clip = capkit.load_clip(video, timeout_seconds=None)
captioner = capkit.load_captioner("demo")
short = capkit.Decoding(max_new_tokens=4)
sweep = capkit.run_sweep(captioner, [video], decodings=[short])
values = {"clip": clip, "caption": captioner.caption(clip, decoding=short), "sweep": sweep}
html = {name: shell.display_formatter.format(value)[0].get("text/html") for name, value in values.items()}
from capkit.views import show_caption, show_clip, show_sweep

expected = {"clip": show_clip(clip).html}
expected |= {"caption": show_caption(values["caption"]).html, "sweep": show_sweep(sweep).html}
print(json.dumps({"before": before, "html": html, "expected": expected}))
"""


def test_ipython_shows_what_the_views_draw_and_importing_capkit_stays_light(tmp_path):
    (tmp_path / "cell.py").write_text(CELL)
    video = next(DEMO_CLIPS.glob("*.mp4"))
    run = subprocess.run([sys.executable, tmp_path / "cell.py", video], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout.splitlines()[-1])
    assert shown["before"] == []
    assert shown["html"] == shown["expected"] and all(shown["html"].values())
