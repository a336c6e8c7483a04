"""The playground's clip: choosing and adding one, its sampled frames, and the clip itself, playing."""

from __future__ import annotations

import functools
import os
import shlex
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

import ipywidgets as widgets
import numpy as np
from PIL import Image

from capkit.captioning import Captioner, demo_notice
from capkit.cogvlm2 import Prompt, pixels_to_frames, preprocess_frames
from capkit.files import atomic_write
from capkit.playground.controls import TEXT, WRAP, button, locked, message_html
from capkit.playground.keys import with_key
from capkit.playground.settings import Settings
from capkit.runs import Item, find_clips
from capkit.text import CapkitWarning, plain_text, plural
from capkit.video import Clip, VideoError, load_clip
from capkit.views import clip_player, note, numbers_warning, picture, time_line, to_webp

_PICTURE = "width:224px;max-width:100%;display:block"
STEP_MILLISECONDS = 600  # of a frame while frames are played


class ClipChooser:
    """The widgets of a clip, which the panel arranges.

    Args:
        clips: file names.
        settings: which frames are sampled.
        captioner: whose picture size and frame numbers are shown.
        uploads: folder of uploaded clips; those of earlier are in the list.
        on_change: called when other frames are chosen.

    Attributes:
        clip: the chosen clip's frames; None if they could not be read.
        notice: see `demo_notice`; of captions of the demo model.
    """

    def __init__(
        self,
        clips: Iterable[str],
        settings: Settings,
        captioner: Captioner,
        uploads: Path,
        on_change: Callable[[], None],
    ) -> None:
        self.settings, self.captioner, self.uploads, self._on_change = settings, captioner, uploads, on_change
        self.clip: Clip | None = None
        self.notice = ""
        self._frames: np.ndarray | None = None  # the clip's, as the model sees them
        self._lock = threading.RLock()
        self._is_paused = False
        self._played: str | None = None  # the file that the player has
        paths = dict.fromkeys([*clips, *map(str, _files_in(uploads))])
        names = [(plain_text(Path(path).name), path) for path in paths]
        self.video = widgets.Dropdown(options=names, description="clip", layout={"flex": "1 1 0", "min_width": "0"})
        narrow = {"width": "36px", "flex": "none"}
        previous = button("", functools.partial(self.go, -1), icon="chevron-left", layout=narrow)
        following = button("", functools.partial(self.go, 1), icon="chevron-right", layout=narrow)
        previous.tooltip, following.tooltip = "previous clip (left arrow)", "next clip (right arrow)"
        steps = with_key(previous, "arrowleft"), with_key(following, "arrowright")
        self.upload = widgets.FileUpload(accept="video/*", description="add a clip")
        hint = "or a file, folder or pattern, for any size"
        self.path = widgets.Text(placeholder=hint, continuous_update=False, layout={"flex": "1 1 0", "min_width": "0"})
        self.message = widgets.HTML()
        self.frame = widgets.IntSlider(0, min=0, max=0, description="frame", layout={"flex": "1 1 0"})
        self.play = widgets.Play(0, min=0, max=0, interval=STEP_MILLISECONDS, show_repeat=False)
        self.play.layout.flex, self.play.tooltip = "none", "play the frames"
        widgets.jslink((self.play, "value"), (self.frame, "value"))  # in the page: it plays as evenly as it can
        self.picture = widgets.HTML()  # unlike widgets.Image it has an alternative text for screen readers
        self.about_frame, self.player = widgets.HTML(), widgets.HTML()
        row = {"align_items": "center"}
        pictures = widgets.HBox([self.picture, self.player], layout=WRAP | {"grid_gap": "6px"})
        self.above = [
            widgets.HBox([self.video, *steps]),
            widgets.HBox([self.upload, self.path]),
            self.message,
            pictures,
        ]
        self.below = [widgets.HBox([self.play, self.frame], layout=row), self.about_frame]
        for control in (self.video, *settings.of_frames.values()):
            control.observe(lambda _: self.read(), "value")
        for control in (self.frame, *settings.of_prompt.values()):
            control.observe(lambda _: self._show_frame(), "value")
        self.upload.observe(lambda _: self._add_uploads(), "value")
        self.path.observe(lambda change: self.add(change["new"]), "value")

    def go(self, step: int) -> None:
        """Choose the clip so many places further on, around the ends."""
        if self.video.options:
            self.video.index = (self.video.index + step) % len(self.video.options)

    @locked
    def read(self) -> None:
        """Read the frames that the settings describe, and show them."""
        if self._is_paused:
            return
        self.clip = self._frames = None
        self.notice, message = "", ""
        try:
            if self.video.value:
                self.clip = load_clip(self.video.value, self.settings.frame_sampling(), *self.settings.window())
        except VideoError as error:
            message = str(error)
        except ValueError as error:
            message = self.settings.in_their_names(str(error))
        self.message.value = message_html(message)
        if self.clip is not None:
            self._frames = pixels_to_frames(preprocess_frames(self.clip.frames, self.captioner.processor.image_size))
            self.notice = demo_notice("demo", self._frames)
            self.play.max = self.frame.max = len(self.clip) - 1
        self._show_player()
        self._show_frame()
        self._on_change()

    def _show_player(self) -> None:
        self.player.layout.display = "none" if self.clip is None else None
        if self.clip is not None and self._played != (path := str(self.video.value)):  # else it goes on playing
            self.player.value, self._played = clip_player(self.clip, server_link(path)), path

    @locked
    def change(self, function: Callable[[], None]) -> None:
        """Call a function that sets several controls, and read the frames once."""
        self._is_paused = True
        try:
            function()
        finally:
            self._is_paused = False
        self.read()

    @locked
    def _show_frame(self) -> None:
        if self.clip is None or self._frames is None:
            self.picture.value = self.about_frame.value = ""
            return
        place = min(self.frame.value, len(self._frames) - 1)
        time = float(self.clip.timestamps_seconds[place])
        template, numbering = self.settings.of_prompt["template"].value, self.settings.effective_frame_numbers()
        numbers = Prompt(template=template, frame_numbers=numbering).numbers(self.clip)
        text = f"frame {place + 1} of {len(self._frames)}, as the model sees it; at {time:.2f} s"
        self.picture.value = picture(to_webp(Image.fromarray(self._frames[place]), 90), text, _PICTURE)
        text += "" if numbers[place] is None else f"; its number in the prompt is {numbers[place]}"
        text += f"<br>{warning}" if (warning := numbers_warning(self.clip, numbers)) else ""
        text += note(self.notice) if self.notice and self.captioner.name == "demo" else ""
        self.about_frame.value = f'<div style="{TEXT}">{text}{time_line(self.clip, time)}</div>'

    def thumbnail(self) -> str:
        """A small picture of the first frame, as HTML."""
        if self._frames is None:
            return ""
        return picture(to_webp(Image.fromarray(self._frames[0]).resize((96, 96))), "", "display:block")

    def _add_uploads(self) -> None:
        for upload in self.upload.value:
            path, content = self.uploads / Path(upload["name"]).name, bytes(upload["content"])
            names = (path.with_stem(f"{path.stem} ({number})") for number in range(2, 1000))
            while path.exists() and path.read_bytes() != content:  # another clip of that name
                path = next(names)
            if not path.exists():  # written again, it would be another file than the one that has captions
                atomic_write(path, content)
            self._choose([str(path)])

    def add(self, text: str) -> None:
        """Add the clips that a file name, folder, pattern or manifest names, and choose the first.

        Quotes and escapes of a shell, and the address of a file manager (file://), are understood. What is wrong is
        said below the box; it stays there to be mended.
        """
        if not text.strip():
            return
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", CapkitWarning)
                items = [item for name in _typed_paths(text) for item in find_clips(name) if item.error is None]
        except ValueError as error:
            self.message.value = message_html(str(error).removeprefix("videos: "))
            return
        self.path.value = ""
        self._choose([*dict.fromkeys(item.video for item in items)])
        if len(items) > 1 or notes:
            said = [f"{plural(len(items), 'clip')} added", *(str(one.message) for one in notes)]
            self.message.value = message_html("; ".join(said), is_good=True)

    @locked
    def _choose(self, paths: list[str]) -> None:
        """Add paths to the list where they are not in it, and choose the first."""
        there = {path for _, path in self.video.options}
        chosen = self.video.value
        if new := [(plain_text(Path(path).name), path) for path in paths if path not in there]:
            self._is_paused = True  # to set options chooses the first
            self.video.options = [*self.video.options, *new]
            self.video.value = chosen
            self._is_paused = False
        if chosen == paths[0]:
            self._played = None
            self.read()  # the file may have changed
        self.video.value = paths[0]

    def items(self, has_all: bool) -> list[Item]:
        """The chosen clip with its window, or all that are in the list."""
        if has_all:
            return [Item(path) for _, path in self.video.options]
        return [Item(self.video.value, start=self.settings.window()[0], end=self.settings.window()[1])]


def _files_in(folder: Path) -> Iterator[Path]:
    """The files in a folder, sorted; not those that are being written."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _typed_paths(text: str) -> list[str]:
    """File names and patterns as typed, pasted from a shell or copied from a file manager."""
    text = text.strip()
    if os.path.lexists(os.path.expanduser(text)):
        return [text]
    if text.startswith("file://"):
        return [url2pathname(urlsplit(text).path)]
    if os.name == "nt" or text.strip("\"'") == text == text.replace("\\", ""):
        return [text.strip("\"'")]
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe in a name
        return [text]


def server_link(path: str | Path) -> str | None:
    """Where the Jupyter server that started this process serves a file; None if it does not."""
    if "JPY_PARENT_PID" not in os.environ:
        return None
    from jupyter_server.serverapp import list_running_servers  # slow, and there in a notebook only

    for server in list_running_servers():
        if str(server["pid"]) == os.environ["JPY_PARENT_PID"]:
            root = Path(server["root_dir"]).resolve()
            if (file := Path(path).resolve()).is_relative_to(root):
                return f"{server['base_url']}files/{quote(file.relative_to(root).as_posix())}"
    return None
