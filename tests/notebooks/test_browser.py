"""Notebooks and views in a real browser: JupyterLab on loopback, driven in headless Chromium.

Screenshots go to runs/browser/. Times are printed (`pytest -s`), never asserted.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from paths import ROOT
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import capkit
from capkit.runs.clips import DEMO_CLIPS
from capkit.views import captions_page, compare_captions, compare_runs, show_caption, show_captions, show_clip, to_webp

# Once more, for Lab and Chromium on a busy machine; what the page showed the first time is kept and printed.
pytestmark = [pytest.mark.needs_browser, pytest.mark.flaky(reruns=1)]
SCREENSHOTS = ROOT / "runs" / "browser"
PATIENCE_SECONDS = 90  # the machine may have other things to do
NASTY = '<script>alert(1)</script> <img src=x onerror=alert(2)> "quoted" שלום עולם 🌟'
NASTY_NAME = 'it\'s "quoted" <img src=x onerror=alert(3)>.mp4'


@pytest.fixture(scope="module")
def chromium():
    expect.set_options(timeout=PATIENCE_SECONDS * 1000)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, whom build machines often are.
        arguments = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, request):
    """Makes pages that reach nothing but this machine; afterwards no dialog may have come up. What they show when a
    test fails is kept: in a picture, and printed."""
    contexts, dialogs = [], []

    def make(width=1400, height=1200, **settings):
        context = chromium.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_SECONDS * 1000)
        page = context.new_page()
        page.away = []  # what it asked of other machines

        def loopback_only(route):
            if urlsplit(route.request.url).hostname in ("127.0.0.1", None):
                return route.continue_()
            page.away.append(route.request.url)
            return route.abort()

        context.route("**/*", loopback_only)
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        return page

    yield make
    for context in contexts:
        if request.node.failed:
            page = context.pages[0]
            page.screenshot(path=SCREENSHOTS / f"failed_{request.node.name}.png")
            print(page.inner_text("body"), page.evaluate("window.seen"), sep="\n")
        context.close()
    assert not dialogs


class Lab:
    """A JupyterLab of its own: root folder, settings and kernels apart from those of whoever runs the tests."""

    def __init__(self, folder):
        self.folder, self.own, self.token = folder / "root", folder / "own", "only-for-this-test"
        self.folder.mkdir()
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        where = {name: str(self.own / name.lower()) for name in names}
        self.set("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})
        self.set("notebook-extension/tracker", {"windowingMode": "none"})  # cells out of sight are in the page too
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root"]
        command += [f"--ServerApp.root_dir={self.folder}", f"--IdentityProvider.token={self.token}"]
        (started_by_make,) = re.findall("jupyter lab .*", (ROOT / "Makefile").read_text())
        command += shlex.split(started_by_make)[2:]
        self.log = open(folder / "lab.log", "w")
        self.process = subprocess.Popen(
            command, env=os.environ | where, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.server_file = Path(where["JUPYTER_RUNTIME_DIR"]) / f"jpserver-{self.process.pid}.json"

    def wait(self):
        until = time.monotonic() + PATIENCE_SECONDS
        while not self.server_file.exists() or not self.server_file.read_text().rstrip().endswith("}"):
            assert self.process.poll() is None and time.monotonic() < until, Path(self.log.name).read_text()
            time.sleep(0.1)
        self.url = f"http://127.0.0.1:{json.loads(self.server_file.read_text())['port']}"

    def set(self, plugin, settings):
        path = self.own / "jupyterlab_settings_dir" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))

    def open(self, page, path):
        page.goto(f"{self.url}/lab/tree/{path.relative_to(self.folder)}?reset&token={self.token}")
        expect(page.locator(".jp-NotebookPanel h1")).to_be_visible()
        page.keyboard.press("Control+B")  # the file browser only takes room
        expect(page.get_by_text("(ipykernel) | Idle")).to_be_visible()  # until then, cells that are run are lost

    def close(self):
        self.process.terminate()  # it ends its kernels
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()  # kernels end when their server is gone
            self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.wait()
        yield lab
    finally:
        lab.close()


# ---- the playground ------------------------------------------------------------------------------------------------

# As slow as a large model, and never at an end: the demo model has said everything before anybody can press Stop.
SLOWLY = """import time
captioner.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.05))
captioner.model.config.eos_token_id = 0
print("slow from here on")"""

# When a button was pressed, when the first word was seen, when Caption could be pressed again, in milliseconds.
WATCH = """() => {
  window.seen = {};
  const caption = () => [...document.querySelectorAll("button")].find(one => one.innerText.trim() == "Caption");
  document.addEventListener("click", event => {
    const name = event.target.closest("button")?.innerText.trim();
    if (name == "Caption") window.seen = {};
    if (name) window.seen[name] ??= performance.now();
  }, true);
  new MutationObserver(() => {
    if (document.querySelector(".capkit-keys")?.textContent.includes("▏")) window.seen.word ??= performance.now();
    else if (window.seen.word && !caption()?.disabled) window.seen.end ??= performance.now();
  }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
}"""


def visible(page, text, **how):
    """What a person sees of a text; the static twin of a widget, which is hidden, has it too."""
    return page.get_by_text(text, **how).filter(visible=True)


class Notebook:
    """A notebook in Lab, by what a person sees of it."""

    def __init__(self, lab, page, notebook, name, **parameters):
        self.lab, self.page = lab, page
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=lab.folder))
        self.path = self.folder / f"{notebook}.ipynb"
        notebook = nbformat.read(ROOT / "notebooks" / self.path.name, 4)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        nbformat.write(notebook, self.path)
        lab.open(page, self.path)

    def button(self, name):
        return self.page.get_by_role("button", name=re.compile(rf"^\W*{name}$"))  # there may be an icon before it

    def control(self, name):
        return self.page.get_by_label(name, exact=True)

    def slider(self, name):
        return self.page.locator(f".widget-slider:has(label:text-is('{name}')) [role=slider]")  # ipywidgets names none

    def menu(self, *names):
        for name in names:
            self.page.get_by_role("menuitem", name=re.compile(f"^{name}$")).click()

    def run_cell(self, text):
        self.page.locator(".jp-CodeCell .cm-content", has_text=text).click()
        self.page.keyboard.press("Control+Enter")

    def screenshot(self, name, *, showing):
        showing.scroll_into_view_if_needed()
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


class Playground(Notebook):
    """Notebook 04."""

    def __init__(self, lab, page, name, **parameters):
        super().__init__(lab, page, "04_playground", name, **parameters)
        self.store = capkit.CaptionStore(self.folder / "runs" / "playground" / "captions.jsonl")

    def cards(self):
        return self.page.locator(".jp-NotebookPanel .widget-vbox:has(> .widget-hbox button:text('make baseline'))")

    def baseline(self):
        return self.cards().filter(has_text="· baseline")

    def run_all(self):
        self.menu("Run", "Run All Cells")
        expect(self.button("Caption")).to_be_enabled()
        self.page.evaluate(WATCH)

    def caption(self):
        """A new card, and the seconds from the click to the first word."""
        before = self.cards().count()
        self.button("Caption").click()
        expect(self.cards()).to_have_count(before + 1)
        seen = self.page.evaluate("window.seen")
        return (seen["word"] - seen["Caption"]) / 1000


def test_playground_by_hand(lab, open_page):
    page = open_page()
    panel = Playground(lab, page, "by_hand")
    panel.run_all()
    panel.screenshot("panel_before", showing=panel.button("Caption"))
    add_a_large_clip(panel)
    panel.control("clip").select_option("green_cross_grows.mp4")
    panel.slider("frame").press("ArrowRight")
    expect(visible(page, "frame 2 of ")).to_be_visible()
    first = panel.caption()
    panel.control("prompt").fill("Describe this video in one sentence.")
    expect(panel.control("preset")).to_have_value("sentence")  # the kernel knows of the prompt
    second = panel.caption()
    print(f"\nfrom click to first word: {first:.2f} s, then {second:.2f} s")
    records = panel.store.current()
    assert [Path(record["video"]).name for record in records] == ["green_cross_grows.mp4"] * 2
    assert records[1]["prompt"] == "Describe this video in one sentence."

    expect(panel.cards().first.locator("u")).not_to_have_count(0)  # what the baseline does not say
    expect(panel.cards().nth(1).locator("u")).to_have_count(0)
    panel.screenshot("panel_after", showing=panel.cards().first)
    panel.cards().first.get_by_role("button", name="make baseline").click()
    # The cards are drawn anew; for a moment two may call themselves the baseline.
    expect(panel.baseline().filter(has_text="in one sentence")).to_have_count(1)
    expect(panel.baseline()).to_have_count(1)
    expect(panel.baseline().locator("u")).to_have_count(0)
    expect(panel.cards().first.locator("u")).not_to_have_count(0)
    expect(panel.cards().first).to_contain_text("differs from the baseline: another prompt")

    stop_half_way(panel)
    rate_a_pair(panel)

    texts = [" ".join(record["text"].split()) for record in panel.store.current()]
    page.keyboard.press("Control+S")
    expect(page.locator(".jp-Document.jp-mod-dirty, .jp-mod-dirty")).to_have_count(0)
    page.reload()
    expect(panel.cards()).to_have_count(3)  # the kernel still has the panel
    panel.menu("Kernel", "Restart Kernel and Run All Cells….*")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    expect(panel.cards()).to_have_count(0)  # the panel anew, with the first clip
    expect(panel.button("Caption")).to_be_enabled()
    panel.control("clip").select_option("green_cross_grows.mp4")
    expect(panel.cards()).to_have_count(len(texts))  # one for each way of asking, the latest
    shown = " ".join(" ".join(panel.cards().all_inner_texts()).split())
    assert all(text in shown for text in texts)
    panel.screenshot("panel_reloaded", showing=panel.cards().first)
    assert page.away == []


def add_a_large_clip(panel):
    """Above what Jupyter takes unless it is told otherwise, as `make lab` does."""
    large, size = panel.folder / "large.mp4", 12 * 2**20
    video = (DEMO_CLIPS / "green_cross_grows.mp4").read_bytes()
    large.write_bytes(video + size.to_bytes(4, "big") + b"free" + bytes(size - 8))
    with panel.page.expect_file_chooser() as chooser:
        panel.page.get_by_role("button", name="add a clip").click()  # its name goes on with a count
    chooser.value.set_files(large)
    expect(panel.control("clip")).to_have_value("large.mp4")
    expect(visible(panel.page, "frame 1 of ")).to_be_visible()


def stop_half_way(panel):
    """Words come while the panel stays usable; Stop keeps what was said."""
    page, words = panel.page, visible(panel.page, "▏")
    slow_down(panel)
    panel.button("Caption").click()
    text = words.inner_text()
    page.wait_for_function("length => document.body.innerText.split('▏')[0].length > length", arg=0)
    expect(words).not_to_have_text(text)
    longer = words.inner_text()
    assert len(longer) > len(text) and longer.startswith(text.removesuffix("▏").rstrip()[:-3])
    started = time.monotonic()
    panel.slider("frame").press("ArrowRight")
    expect(visible(page, "frame 3 of ")).to_be_visible()
    print(f"another frame while a caption is made: {time.monotonic() - started:.2f} s")
    panel.screenshot("panel_while", showing=panel.button("Stop"))
    panel.button("Stop").click()
    expect(panel.cards()).to_have_count(3)
    page.wait_for_function("window.seen.end")
    seen = page.evaluate("window.seen")
    print(f"slowed to 0.05 s a token, first word: {(seen['word'] - seen['Caption']) / 1000:.2f} s", end=", ")
    print(f"from Stop to stopped: {(seen['end'] - seen['Stop']) / 1000:.2f} s")
    record = panel.store.lines()[-1]
    assert record["finish_reason"] == "stopped" and 0 < record["num_tokens"] < 2048
    expect(panel.cards().first).to_contain_text("ended by stopped")


def rate_a_pair(panel):
    panel.run_cell("blind = BlindRating")
    left = visible(panel.page, re.compile(r"\d+ pairs? left"))
    pairs = left.inner_text()
    panel.screenshot("blind", showing=panel.button("tie"))
    panel.button("A is better").click()
    expect(visible(panel.page, pairs)).to_have_count(0)
    (rating,) = map(json.loads, (panel.folder / "runs/playground/ratings.jsonl").read_text().splitlines())
    assert rating["outcome"] == "first" and rating["clip"].endswith("green_cross_grows.mp4")


def test_playground_by_keyboard_in_a_narrow_window(lab, open_page):
    page = open_page(width=500)
    panel = Playground(lab, page, "by_keyboard")
    panel.run_all()
    panel.screenshot("narrow", showing=panel.button("Caption"))
    wide = page.evaluate(
        "[...document.querySelectorAll('.widget-vbox')].filter(one => one.scrollWidth > one.clientWidth + 4)"
    )
    assert wide == []  # nothing is cut off or needs scrolling sideways
    panel.control("clip").focus()
    reached = [tab_on(page) for _ in range(40)]
    assert {"prompt", "template", "max_new_tokens", "Caption"} <= set(reached)
    assert "top_k" not in reached  # it is grey
    panel.control("prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("List the objects in this video.")
    while tab_on(page) != "Caption":
        pass
    panel.screenshot("focus", showing=panel.button("Caption"))
    page.keyboard.press("Space")
    expect(panel.cards()).to_have_count(1)
    assert panel.store.current()[0]["prompt"] == "List the objects in this video."
    panel.screenshot("narrow_result", showing=panel.cards().first)


def slow_down(panel, seconds=0.05):
    """Make the model endless, and slow by so many seconds a token, in a cell of its own."""
    page = panel.page
    cells = page.locator(".jp-CodeCell .cm-content")
    expected = cells.count() + 1
    page.get_by_role("button", name="Click to add a cell").click()
    expect(cells).to_have_count(expected)
    cells.last.fill(SLOWLY.replace("0.05", str(seconds)))
    cells.last.press("Control+Enter")
    expect(page.locator(".jp-OutputArea-output", has_text="slow from here on")).to_be_visible()


def test_playground_by_keys_and_while_a_text_is_typed(lab, open_page):
    """Keys work in the panel, and Lab sees none of them; what is typed goes on while captions arrive."""
    page = open_page()
    panel = Playground(lab, page, "by_keys")
    panel.run_all()
    words, cells = visible(page, "▏"), page.locator(".jp-Cell")
    for number, prompt in enumerate(("What happens?", "Which colours?"), 1):
        panel.control("prompt").fill(prompt)
        panel.control("prompt").press("Control+Enter")
        expect(panel.cards()).to_have_count(number)
    slow_down(panel)
    num_cells = cells.count()
    panel.control("answer prefix").fill("I see")  # which the kernel gets only when the box is left
    panel.control("answer prefix").press("Control+Enter")
    expect(words).to_contain_text("I see")
    panel.cards().first.get_by_role("button", name="edit").click()
    box = panel.cards().first.get_by_role("textbox")
    box.fill("")
    box.press_sequentially("By hand, ")
    page.keyboard.press("Escape")  # in a box too
    expect(panel.cards()).to_have_count(3)
    page.keyboard.type("and dd on")  # where Lab would delete a cell
    expect(box).to_have_value("By hand, and dd on")
    page.get_by_role("button", name="save edit").click()
    expect(visible(page, "kept", exact=True)).to_be_visible()
    texts = [record.get("edited_text") for record in panel.store.current()]
    assert texts == [None, "By hand, and dd on", None]
    assert panel.store.current()[2]["finish_reason"] == "stopped"

    panel.button("Caption").click()  # disabled by that, it loses the focus
    expect(words).to_be_visible()
    expect(panel.button("Stop")).to_be_enabled()
    page.keyboard.press("ArrowRight")
    expect(panel.control("clip")).not_to_have_value("camera_pans_right.mp4")
    expect(page.locator(".widget-html", has_text=re.compile("^camera_pans_right.mp4:"))).to_be_visible()
    panel.screenshot("panel_other_clip", showing=panel.control("clip"))
    page.keyboard.press("ArrowLeft")
    expect(panel.cards()).to_have_count(3)
    page.keyboard.press("Escape")
    expect(panel.cards()).to_have_count(4)

    panel.run_cell("blind = BlindRating")
    expect(visible(page, "1 pair left")).to_be_visible()
    visible(page, "1 pair left").click()
    page.keyboard.press("b")
    expect(visible(page, "All rated.")).to_be_visible()
    page.keyboard.press("a")  # nothing is left to rate; Lab would add a cell
    page.keyboard.press("u")
    expect(visible(page, "1 pair left")).to_be_visible()
    page.keyboard.press("t")
    expect(visible(page, "All rated.")).to_be_visible()
    lines = map(json.loads, (panel.folder / "runs/playground/ratings.jsonl").read_text().splitlines())
    assert [line["outcome"] for line in lines] == ["second", "undone", "tie"]
    assert cells.count() == num_cells and page.away == []


def test_the_clip_plays_beside_its_frames(lab, open_page):
    page = open_page()
    panel = Playground(lab, page, "plays")
    panel.run_all()
    video = page.locator(".jp-NotebookPanel video")
    expect(video).to_have_count(1)
    seconds = video.evaluate("""one => new Promise((done, failed) => {
        one.onerror = () => failed(one.error.message);
        one.ontimeupdate = () => one.currentTime > 0.2 && done(one.duration);
        one.play();
    })""")
    assert seconds == pytest.approx(
        capkit.load_clip(DEMO_CLIPS / "camera_pans_right.mp4").info.duration_seconds, abs=0.2
    )
    page.locator(".widget-play button").first.click()  # of the frames
    expect(visible(page, "frame 4 of ")).to_be_visible()
    panel.screenshot("panel_plays", showing=video)


@pytest.mark.parametrize("width", [1400, 800])
@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_the_playground_is_readable(lab, open_page, theme, width):
    """Pictures to look at; and nothing is wider than the window."""
    page = open_page(width=width, height=1500)
    lab.set("apputils-extension/themes", {"theme": f"JupyterLab {theme}"})
    panel = Playground(lab, page, f"readable_{theme}_{width}")
    panel.run_all()
    panel.control("clip").select_option("purple_circle_appears.mp4")
    expect(visible(page, "frame 1 of ")).to_be_visible()
    panel.caption()
    panel.control("prompt").fill("the same again and " * 60)
    expect(panel.control("preset")).to_have_value("")
    panel.caption()
    panel.control("preset").select_option("sentence")
    panel.caption()
    panel.cards().nth(1).get_by_role("button", name="fold").click()
    panel.cards().first.get_by_role("button", name="to a sweep").click()
    expect(panel.button("sweep this clip")).to_be_visible()
    name = f"panel_{theme.lower()}_{width}"
    panel.screenshot(name, showing=panel.control("clip"))
    panel.screenshot(f"{name}_cards", showing=panel.cards().last)
    wide = page.evaluate(
        "[...document.querySelectorAll('.widget-vbox')].filter(one => one.scrollWidth > one.clientWidth + 4).length"
    )
    assert wide == 0
    lab.set("apputils-extension/themes", {"theme": "JupyterLab Light"})


def test_a_caption_of_2000_tokens_streams(lab, open_page):
    """Printed, not asserted: how long the page was busy at a time. The words never stretch it."""
    page = open_page()
    panel = Playground(lab, page, "long")
    panel.run_all()
    slow_down(panel, 0.015)
    page.evaluate("""() => {
        window.gaps = [];
        let before = performance.now();
        const step = now => { window.gaps.push(now - before); before = now; requestAnimationFrame(step); };
        requestAnimationFrame(step);
    }""")
    panel.control("max_new_tokens").fill("2000")
    panel.control("max_new_tokens").press("Control+Enter")
    words = visible(page, "▏")
    expect(words).to_be_visible()
    page.wait_for_function("document.body.textContent.split('▏')[0].length > 0")
    height = "document.querySelector('.jp-NotebookPanel .capkit-keys').scrollHeight"
    early = page.evaluate(height)
    expect(panel.cards()).to_have_count(1, timeout=300_000)
    assert panel.store.current()[0]["num_tokens"] > 1900  # what the model's positions leave
    gaps = np.array(page.evaluate("window.gaps"))
    print(
        f"\n2,000 tokens: a frame in {np.median(gaps):.0f} ms (median), {np.quantile(gaps, 0.99):.0f} ms (99 %)", end=""
    )
    print(f", the slowest of the last 100 {gaps[-100:].max():.0f} ms, of all {gaps.max():.0f} ms")
    assert page.evaluate(height) < early + 1000


def tab_on(page):
    """Press Tab; what the control then reached is called."""
    page.keyboard.press("Tab")
    return page.evaluate("""() => { const at = document.activeElement;
        return (at.labels?.[0]?.innerText || at.getAttribute("aria-label") || at.innerText || "").trim() }""")


def test_whatever_texts_and_file_names_say_is_shown_as_text_in_the_playground(lab, open_page):
    page = open_page()
    lab.set("apputils-extension/themes", {"theme": "JupyterLab Dark"})
    clips = lab.folder / "nasty_clips"
    clips.mkdir(exist_ok=True)
    shutil.copy(DEMO_CLIPS / "green_cross_grows.mp4", clips / NASTY_NAME)
    panel = Playground(lab, page, "nasty", videos=str(clips))
    panel.run_all()
    panel.caption()
    panel.control("prompt").fill(NASTY)
    expect(panel.control("preset")).to_have_value("")  # the kernel knows of the prompt
    panel.caption()
    card = panel.cards().first
    expect(card).to_contain_text(NASTY)
    card.get_by_role("button", name="edit").click()
    card.get_by_role("textbox").fill(NASTY)
    card.get_by_role("button", name="edit").click()
    expect(visible(page, "kept", exact=True)).to_be_visible()
    assert panel.cards().first.inner_text().count(NASTY) == 2  # prompt and caption
    panel.screenshot("dark_panel", showing=card)
    panel.run_cell("blind = BlindRating")
    expect(visible(page, NASTY_NAME + "; 1 pair left")).to_be_visible()
    expect(page.locator(".jp-OutputArea-output", has=panel.button("tie"))).to_contain_text(NASTY)
    panel.screenshot("dark_blind", showing=panel.button("tie"))
    lab.set("apputils-extension/themes", {"theme": "JupyterLab Light"})


# ---- marking -------------------------------------------------------------------------------------------------------


def test_marking_by_hand(lab, open_page):
    """Notebook 02 in Lab: mark two captions of the sample, undo one, run the table again, restart, and go on."""
    page = open_page(height=1000)
    store = capkit.CaptionStore(tempfile.mkdtemp(dir=lab.folder) + "/captions.jsonl")
    captioner = capkit.load_captioner("demo", device="cpu")
    capkit.run_sweep(captioner, capkit.find_clips("demo", limit=2), store, prompts=["default", "sentence"])
    store.edit(store.current()[0]["request"], f"{NASTY} square")
    notebook = Notebook(lab, page, "02_view_frames", "marking", store=str(store.path), num_to_mark=4)
    notebook.menu("Run", "Run All Cells")
    expect(notebook.button("right").first).to_be_enabled()
    sample = [record["request"] for record in capkit.audit(store, 4).records]
    expect(visible(page, "caption 1 of 4; 4 not marked")).to_be_visible()
    notebook.screenshot("marking_first", showing=notebook.button("right").first)
    notebook.control("wrong words").fill("no such word")
    notebook.button("wrong").click()
    expect(page.get_by_role("alert")).to_contain_text("'no such word' is not in the caption")
    word = store.latest(sample[:1])[0]
    word = word.get("edited_text", word["text"]).split()[-1].strip(".")
    notebook.control("wrong words").fill(word)
    notebook.control("remark").fill(NASTY)
    notebook.button("wrong").click()
    expect(visible(page, "caption 2 of 4; 3 not marked")).to_be_visible()
    assert [store.latest(sample[:1])[0][name] for name in ("mark", "wrong_words", "remark")] == ["wrong", [word], NASTY]
    notebook.button("right").first.click()
    expect(visible(page, "caption 3 of 4; 2 not marked")).to_be_visible()
    notebook.button("undo").click()
    expect(visible(page, "caption 2 of 4; 3 not marked")).to_be_visible()
    assert "mark" not in store.latest(sample[1:2])[0]
    notebook.button("previous").click()
    expect(notebook.control("remark")).to_have_value(NASTY)
    expect(page.locator(".widget-html", has_text="marked wrong")).to_contain_text(NASTY)
    notebook.screenshot("marking_marked", showing=notebook.button("right").first)
    notebook.run_cell("print(sample)")
    expect(visible(page, "1 of 1 are wrong, 100.0%")).to_be_visible()
    notebook.run_cell("capkit.replace(captions")
    expect(page.locator(".jp-OutputArea-output", has_text="would be replaced in")).to_contain_text("Nothing is written")
    notebook.screenshot("replace_preview", showing=page.get_by_text("would be replaced in"))
    looked = page.locator(".widget-vbox", has_text="below each frame, its share of the attention").last  # innermost
    looked.get_by_role("button").last.click()  # a word of the caption, which may be "right"
    expect(looked.get_by_role("button").last).to_have_class(re.compile("mod-info"))
    expect(looked.locator("img").first).to_be_visible()
    notebook.screenshot("looked", showing=looked)
    notebook.menu("Kernel", "Restart Kernel and Run All Cells….*")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    expect(visible(page, "caption 2 of 4; 3 not marked")).to_be_visible()  # the first that is not marked
    assert page.away == []


def test_a_widget_is_seen_once_and_its_static_twin_after_saving(lab, open_page):
    """Live, saved as it was filtered last, and opened by someone who has neither the kernel nor the trust."""
    path = lab.folder / "kept.ipynb"
    source = "import pandas as pd\nfrom capkit.playground import browse\n"
    source += "browse(pd.DataFrame({'cell': ['alpha', 'beta'], 'words': [1, 2]}))"
    cells = [nbformat.v4.new_markdown_cell("# Kept?"), nbformat.v4.new_code_cell(source)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    page = open_page()
    lab.open(page, path)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.get_by_placeholder("only rows with this text").fill("ALPHA")
    page.keyboard.press("Enter")
    seen, twin = page.locator(".jupyter-widgets td"), page.locator("[class*=capkit-kept]")
    expect(seen).to_have_text(["alpha", "1"])
    expect(twin.locator("td")).to_have_text(["alpha", "1"])
    expect(twin).to_be_hidden()
    page.screenshot(path=SCREENSHOTS / "kept_live.png")
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Save Notebook( Ctrl.*)?$")).click()
    until = time.monotonic() + PATIENCE_SECONDS
    while "capkit-kept" not in path.read_text() and time.monotonic() < until:
        page.wait_for_timeout(200)  # Lab's requests go on meanwhile, which a sleep would hold up
    saved = nbformat.read(path, 4)
    assert not saved.metadata.get("widgets")
    saved.cells[0].source += " By another."  # no longer what was trusted here
    nbformat.write(saved, path.with_name("sent.ipynb"))
    page = open_page()
    lab.open(page, path.with_name("sent.ipynb"))
    seen = page.locator(".jp-OutputArea-output td")  # Lab takes the class away
    expect(seen).to_have_text(["alpha", "1"])
    expect(seen.first).to_be_visible()
    page.screenshot(path=SCREENSHOTS / "kept_sent.png")


# ---- views ---------------------------------------------------------------------------------------------------------


def test_whatever_texts_and_file_names_say_is_shown_as_text_in_views(open_page, tmp_path):
    clip = capkit.load_clip(shutil.copy(DEMO_CLIPS / "green_cross_grows.mp4", tmp_path / NASTY_NAME))
    captioner = capkit.load_captioner("demo", device="cpu")
    store = capkit.CaptionStore(tmp_path / "captions.jsonl")
    result = capkit.run_sweep(captioner, [clip.info.path], store, prompts=["default", NASTY])
    for record in result.records:
        store.edit(record["request"], NASTY)
    records = store.current()
    views = {
        "captions": show_captions(store, records),
        "clip": show_clip(clip),
        "caption": show_caption(records[0], clip),
        "compared": compare_captions([NASTY, records[1]], [NASTY, NASTY_NAME], clip),
        "differences": compare_captions([records[0], NASTY], [NASTY, NASTY_NAME], store=store),
        "page": captions_page(store, title=NASTY),
    }
    page = open_page(height=900)
    for name, view in views.items():
        page.set_content(f'<meta charset="utf-8">{view._repr_html_()}')
        page.screenshot(path=SCREENSHOTS / f"view_{name}.png", full_page=True)
        assert name == "clip" or NASTY in unwrapped(page), name
        assert name == "caption" or NASTY_NAME in unwrapped(page), name
        assert page.locator("script, img[src=x]").count() == 0, name
        assert pictures(page.locator("img")), name
    page.goto(views["page"].save(tmp_path / "page.html").as_uri())
    assert NASTY in unwrapped(page) and NASTY_NAME in unwrapped(page)
    assert page.locator("script").count() == 2 and page.locator("img[src=x]").count() == 0  # its own


def unwrapped(page):
    """What the page says, on one line."""
    return " ".join(page.locator("body").inner_text().split())


def pictures(images):
    """How many pictures there are; all of them must be there to be seen."""
    widths = images.evaluate_all(
        "all => Promise.all(all.map(one => one.decode().then(() => one.naturalWidth, () => 0)))"
    )
    assert all(widths)
    return len(widths)


@pytest.mark.parametrize("name", ["01", "02", "03"])
def test_executed_notebooks_show_their_pictures_to_anybody(lab, open_page, executed, name):
    """Opened untrusted in Lab, and as HTML: with JavaScript off, and without a network."""
    _, notebook, _ = executed(name)
    (lab.folder / "executed").mkdir(exist_ok=True)
    path = lab.folder / "executed" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    assert path.stat().st_size < 8e6
    outputs = [str(output.get("data", {})) for cell in notebook.cells for output in cell.get("outputs", ())]
    wanted = sum(output.count("<img ") + output.count("'image/png'") for output in outputs)
    assert wanted >= 4
    page = open_page()
    lab.open(page, path)
    expect(page.locator(".jp-OutputArea-output img")).to_have_count(wanted)
    assert pictures(page.locator(".jp-OutputArea-output img")) == wanted
    panel_is_untrusted = page.locator("[title*='not trusted' i], [aria-label*='not trusted' i]")
    expect(panel_is_untrusted.first).to_be_attached()
    page.screenshot(path=SCREENSHOTS / f"untrusted_{name}.png")
    html = path.with_suffix(".html")
    html.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    for has_scripts in (True, False):
        page = open_page(java_script_enabled=has_scripts)
        page.goto(html.as_uri(), wait_until="domcontentloaded")
        assert pictures(page.locator(".jp-OutputArea-output img")) == wanted
    page.screenshot(path=SCREENSHOTS / f"html_{name}.png", full_page=True)


def a_matrix(folder, num_clips, prompts, strip, text=lambda clip, prompt: f"Clip {clip} says {prompt}"):
    """A store with a caption for each clip and prompt, and pictures."""
    store = capkit.CaptionStore(folder / "captions.jsonl")
    record = {"status": "ok", "error": None, "timestamps_seconds": [0.0], "finish_reason": "eos", "seconds": 1.0}
    record |= {"template": "chat", "decoding": {"max_new_tokens": 2048}, "start_seconds": 0.0, "mean_logprob": -1.0}
    lines = [
        record
        | {"request": f"{clip}-{number}", "video": f"/clips/clip {clip}.mp4", "strip": f"{clip}.webp"}
        | {"prompt": prompt, "text": text(clip, prompt), "num_tokens": 100 * number + clip}
        for clip in range(num_clips)
        for number, prompt in enumerate(prompts)
    ]
    store.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store.strips.mkdir()
    for clip in range(num_clips):
        (store.strips / f"{clip}.webp").write_bytes(strip + f"{clip:4}".encode())  # each its own picture
    return store


@pytest.fixture
def strip():
    """As large as a page takes them as they are: noise of 4 frames is as much as 24 of a film."""
    noise = np.random.default_rng(0).integers(0, 256, (112, 4 * 112, 3), np.uint8)
    return to_webp(Image.fromarray(noise), 25)


class Matrix:
    """A page of captions, by what a person sees of it."""

    def __init__(self, page):
        self.page, self.rows = page, page.locator("main > .row")
        self.search = page.get_by_role("searchbox", name="search")

    def clips(self):
        return [name.split(".mp4")[0] for name in self.rows.locator(".name").filter(visible=True).all_text_contents()]

    def cells(self):
        return self.page.locator(".headings .cell b").filter(visible=True).all_inner_texts()

    def marked(self):
        """The words that are seen as marked."""
        return self.page.locator("main u").evaluate_all(
            "all => all.filter(u => getComputedStyle(u).textDecorationLine == 'underline').map(u => u.textContent)"
        )

    def filter(self, column):
        self.page.get_by_role("button", name="+ filter").click()
        self.page.get_by_role("combobox", name="column").last.select_option(column)


def test_a_matrix_searches_filters_sorts_and_hides(open_page, tmp_path, strip):
    prompts = ["Why?", "Who?", "When?"]
    store = a_matrix(tmp_path, 3, prompts, strip)
    lines = [json.loads(line) for line in store.path.read_text().splitlines()]
    lines[4] |= {"status": "error", "error": "it is empty", "text": None, "num_tokens": None}  # clip 1, Who?
    lines[8] |= {"mark": "wrong"}  # clip 2, When?
    store.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store.edit("0-1", "By hand, Who?")
    page = open_page()
    page.goto(captions_page(store, title=NASTY).save(tmp_path / "page.html").as_uri())
    matrix, status = Matrix(page), page.get_by_role("status")
    assert matrix.clips() == ["clip 0", "clip 1", "clip 2"] and matrix.cells() == prompts
    expect(status).to_have_text("3 of 3 rows, 8 captions and 1 error")
    expect(page.get_by_text("not captioned: it is empty")).to_be_visible()
    expect(page.locator(".edited")).to_contain_text("By hand, Who?")
    assert page.title() == NASTY

    page.keyboard.press("/")
    page.keyboard.type("says  WHEN")
    expect(status).to_have_text("3 of 3 rows, 3 captions and 0 errors")
    matrix.search.fill("clip 2")
    assert matrix.clips() == ["clip 2"]
    matrix.search.fill("it is empty")
    assert matrix.clips() == ["clip 1"]
    matrix.search.fill("in no caption")
    assert matrix.clips() == []
    matrix.search.fill("")

    matrix.filter("num_tokens")
    page.get_by_role("spinbutton", name="num_tokens from").fill("101")
    page.get_by_role("spinbutton", name="num_tokens to").fill("200")
    assert matrix.clips() == ["clip 0", "clip 2"]
    expect(page.locator(".hit")).to_have_count(2)  # 102 and 200
    matrix.filter("mark")
    page.get_by_role("combobox", name="mark").select_option("wrong")
    assert matrix.clips() == []  # of 202 tokens
    page.get_by_role("button", name="remove this filter").first.click()
    assert matrix.clips() == ["clip 2"]
    page.get_by_role("button", name="remove this filter").first.click()

    page.get_by_role("combobox", name="sort by").select_option("num_tokens")
    page.get_by_role("checkbox", name="largest first").check()
    assert matrix.clips() == ["clip 2", "clip 1", "clip 0"]
    page.get_by_role("combobox", name="of cell").select_option("of Who?")
    assert matrix.clips() == ["clip 2", "clip 0", "clip 1"]  # an error has none
    page.get_by_role("checkbox", name="largest first").uncheck()
    assert matrix.clips() == ["clip 0", "clip 2", "clip 1"]
    page.get_by_role("combobox", name="sort by").select_option("page order")
    assert matrix.clips() == ["clip 0", "clip 1", "clip 2"]

    words = ["Why?", "By hand, Who?", "When?"] + ["Why?", "When?"] + ["Why?", "Who?", "When?"]
    assert matrix.marked() == words
    page.get_by_role("checkbox", name="differences").uncheck()
    assert matrix.marked() == []
    page.get_by_role("checkbox", name="differences").check()
    assert matrix.marked() == words

    matrix.search.fill("When")
    page.get_by_text("3 of 3 cells").click()
    page.get_by_role("checkbox", name="When?").uncheck()
    assert matrix.cells() == ["Why?", "Who?"] and matrix.clips() == []  # what is hidden is not searched
    matrix.search.fill("")
    page.get_by_role("checkbox", name="Who?").uncheck()
    assert matrix.cells() == ["Why?"] and matrix.clips() == ["clip 0", "clip 1", "clip 2"]
    page.get_by_role("checkbox", name="Who?").check()
    page.keyboard.press("Escape")
    expect(page.get_by_role("checkbox", name="Who?")).to_be_hidden()
    page.get_by_role("checkbox", name="frames").uncheck()
    expect(matrix.rows.first.locator("img")).to_be_hidden()
    assert page.away == []


def test_what_changed_shows_only_what_changed(open_page, tmp_path, strip):
    stores = []
    for name, word in (("old", "dog"), ("new", "cat")):
        (tmp_path / name).mkdir()
        text = lambda clip, _, word=word: f"A {word if clip == 1 else 'bird'} runs."  # noqa: E731
        stores.append(a_matrix(tmp_path / name, 4, ["What?"], strip, text))
    page = open_page(color_scheme="dark")
    page.goto(compare_runs(*stores).save(tmp_path / "page.html").as_uri())
    matrix = Matrix(page)
    assert matrix.clips() == ["clip 1", "clip 0", "clip 2", "clip 3"]
    page.get_by_role("combobox", name="change").select_option("changed")
    assert matrix.clips() == ["clip 1"] and matrix.marked() == ["dog", "cat"]
    page.get_by_role("combobox", name="change").select_option("same")
    assert matrix.clips() == ["clip 0", "clip 2", "clip 3"]
    page.screenshot(path=SCREENSHOTS / "what_changed.png")


def test_a_page_of_a_thousand_clips_in_eight_cells_opens_alone(open_page, tmp_path, strip):
    """It reaches for nothing. Every caption has other words than the baseline's."""
    prompts = [f"Describe it in the way of number {number}." for number in range(8)]

    def text(clip, prompt):
        words = f"clip {clip} {prompt} the video shows a room with a table and two chairs that nobody uses".split()
        return " ".join(words[(place * (7 + prompts.index(prompt)) + clip) % len(words)] for place in range(80))

    store = a_matrix(tmp_path, 1000, prompts, strip, text)
    started = time.monotonic()
    path = captions_page(store).save(tmp_path / "page.html")
    written, size = time.monotonic() - started, path.stat().st_size
    assert size < 60e6
    page = open_page(height=900)
    page.goto(path.as_uri())
    opened, painted = page.evaluate("""() => new Promise(done => requestAnimationFrame(() => done([
        performance.getEntriesByType('navigation')[0].loadEventEnd, performance.now()])))""")
    print(f"\n1,000 clips x 8 cells, strips of {len(strip) / 1e3:.1f} KB: written in {written:.1f} s", end=", ")
    print(f"{size / 1e6:.1f} MB, open after {opened / 1000:.2f} s, painted by {painted / 1000:.2f} s", end=", ")
    matrix = Matrix(page)
    expect(page.get_by_role("status")).to_have_text("1,000 of 1,000 rows, 8,000 captions and 0 errors")
    assert page.away == []
    page.screenshot(path=SCREENSHOTS / "matrix.png")
    last = matrix.rows.last.locator("img")
    last.scroll_into_view_if_needed()
    expect(last).to_be_in_viewport()
    assert pictures(last) == 1
    searched = page.evaluate("""() => {
        const box = document.querySelector("[type=search]"), started = performance.now();
        box.value = "clip 777";
        box.dispatchEvent(new Event("input"));
        document.body.offsetHeight;
        return performance.now() - started;
    }""")
    print(f"searched in {searched / 1000:.2f} s")
    assert matrix.clips() == ["clip 777"]
