"""Find the cuts of a film, where one shot ends and the next begins, with PySceneDetect (the extra `shots`).

Hard cuts are found; fades and dissolves, in which no frame is the first of the next shot, are not.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capkit.video.container import VideoFile
from capkit.video.pictures import VideoInfo
from capkit.video.reading import Times, view_frames

if TYPE_CHECKING:
    from av import VideoFrame

LEAST_SHOT_SECONDS = 0.5
WIDTH = 256  # pixels, of the pictures that PySceneDetect compares, as in its own SceneManager
LIKENESS = 0.5  # pictures are alike if their colours differ by less than this share of the difference at a cut
ANSWER_SECONDS = 1.0  # from one answer of `find_cuts` to the next


class CutFinder:
    """Finds cuts in the frames of a film, which come one after the other; a few are in memory at a time.

    What leads back to the picture before it within half a second is a flash or a jolt of the camera, and no cut, though
    PySceneDetect takes it for one.

    Attributes:
        cuts: indices of the first frames of new shots, so far.
        share: of the frames, that were seen so far.
    """

    def __init__(self, times: Times, info: VideoInfo) -> None:
        from scenedetect import AdaptiveDetector

        self.times, self.info = times, info
        self.cuts: list[int] = []
        self.share = 0.0
        self._height = 0
        self._detector = AdaptiveDetector(min_scene_len=0)
        self._reach = int(np.clip(LEAST_SHOT_SECONDS * info.average_fps, 3, 60))  # frames looked at after a cut
        # Indices, and the colours of 16 x 16 fields.
        self._recent = deque[tuple[int, NDArray[np.int16]]](maxlen=self._reach + 1)
        self._candidates = deque[int]()
        self._back = 0  # the frame at which the latest flash is over

    def set_format(self, frame: VideoFrame, video: VideoFile) -> None:
        """Have all pictures in the shape of the first, though the film may change it."""
        self._height = self._height or max(round(WIDTH * frame.height / frame.width), 1)

    def wants(self, index: int) -> bool:
        """False: damage of a frame does not stop the search."""
        return False

    def take(self, index: int, frame: VideoFrame, video: VideoFile) -> None:
        """Look at the next frame."""
        import cv2
        from scenedetect import FrameTimecode

        pixels = frame.to_ndarray(format="bgr24", width=WIDTH, height=self._height, interpolation="AREA")
        place = FrameTimecode(index, fps=25.0)  # only the index is used
        self._candidates.extend(cut.frame_num for cut in self._detector.process_frame(place, pixels))
        few = cv2.resize(pixels, (16, 16), interpolation=cv2.INTER_AREA)
        self._recent.append((index, few.astype(np.int16)))
        self.share = (index + 1) / self.info.num_frames
        while self._candidates and index >= self._candidates[0] + self._reach - 1:
            self._decide()

    def cut_seconds(self) -> list[float]:
        """When the new shots begin, once all frames were seen."""
        while self._candidates:
            self._decide()
        return self.times[self.cuts].tolist()

    def _decide(self) -> None:
        """Keep the oldest candidate as a cut, unless the picture before it comes back."""
        cut = self._candidates.popleft()
        if cut <= self._back:
            return
        indices, colours = zip(*self._recent, strict=True)
        at = indices.index(cut)
        differences = np.abs(np.stack(colours[at:]) - colours[at - 1]).mean(axis=(1, 2, 3))
        alike = np.flatnonzero(differences < LIKENESS * differences[0])
        if alike.size:
            self._back = indices[at + alike[0]]
        else:
            self.cuts.append(cut)


class _Search(threading.Thread):
    """A search for a file's cuts, in a thread that ends with the process."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self.path, self.answered = path, -1.0
        self.finder: CutFinder | None = None
        self.result: tuple[list[float], float] | Exception = ([], 0.0)

    @property
    def share(self) -> float:
        return self.finder.share if self.finder else 0.0

    def run(self) -> None:
        def start(times: Times, info: VideoInfo) -> CutFinder:
            self.finder = CutFinder(times, info)
            return self.finder

        try:
            finder = view_frames(self.path, start)
            self.result = finder.cut_seconds(), finder.info.duration_seconds
        except Exception as error:
            self.result = error


_searches: dict[str, _Search] = {}


def find_cuts(path: str) -> float | tuple[list[float], float]:
    """Search a file for its cuts. Called again until it has them, it answers as soon as it has come further.

    Returns:
        The share of the frames seen so far. At the end, when the second and later shots begin, in ascending order, and
        the file's duration, in seconds.

    Raises:
        VideoError, MemoryError: as `read_frames`.
        ImportError: PySceneDetect is not installed.
    """
    if path not in _searches:
        _searches[path] = _Search(path)
        _searches[path].start()
    search = _searches[path]
    search.join(ANSWER_SECONDS)
    while search.is_alive() and search.share == search.answered:
        search.join(ANSWER_SECONDS)
    if search.is_alive():
        search.answered = search.share
        return search.answered
    del _searches[path]
    if isinstance(search.result, Exception):
        raise search.result
    return search.result
