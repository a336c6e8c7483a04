"""The clips that the tests of this folder read."""

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
