"""The clips that the tests of this folder read."""

import os
import subprocess
import sys

import pytest
from video_factory import KINDS, encode_clip


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """clips(name): path of a clip with the settings in `KINDS`; clips(name, **settings): with these. Encoded once."""
    folder, paths = tmp_path_factory.mktemp("clips"), {}

    def make(name, **settings):
        if name not in paths:
            paths[name] = encode_clip(folder / name, **(settings or KINDS[name]))
        return paths[name]

    return make


@pytest.fixture
def cpu_load():
    """Twice as many busy processes as there are processors."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for process in busy:
        process.kill()
        process.wait()
