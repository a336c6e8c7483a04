"""Fixtures, and the rule for tests that need what a machine may lack."""

import functools
import json
import os
import shutil

import numpy as np
import pytest
from paths import GOLDEN

# Minutes each, so that they begin first: two workers then end at about the same time.
LONG_FILES = ("test_browser.py", "test_ray_engine.py", "test_notebooks.py", "test_types.py")


def pytest_collection_modifyitems(items):
    """Put long files first. Skip what a machine lacks, unless CAPKIT_REQUIRE names it: then the test runs and fails."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    required = set(os.environ.get("CAPKIT_REQUIRE", "").split(","))
    for item in items:
        if item.get_closest_marker("needs_cuda") and "cuda" not in required:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("needs_browser") and "browser" not in required and not shutil.which("chromium"):
            item.add_marker(pytest.mark.skip(reason="no Chromium"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fixtures can see whether their test has failed: `request.node.failed`."""
    report = yield
    item.failed = report.failed if call.when == "setup" else item.failed or report.failed
    return report


class GoldenCase:
    """Numbers of the original implementation: `frames`, `pixel_values`, `input_ids`, ..., as numpy arrays."""

    def __init__(self, index, asked, numbers):
        self.template, self.query = asked["template"], asked["query"]
        self.history = tuple(map(tuple, asked.get("history", ())))
        self.greedy_text = asked["greedy_text"]
        for name, values in numbers.items():
            if name.startswith(f"case{index}."):
                setattr(self, name.split(".", 1)[1], values)
        self.settings = {"template": self.template, "history": self.history}


@pytest.fixture(scope="session")
def golden_cases():
    from safetensors.numpy import load_file

    numbers = load_file(GOLDEN / "golden.safetensors")
    return [GoldenCase(i, asked, numbers) for i, asked in enumerate(json.loads((GOLDEN / "golden.json").read_text()))]


@pytest.fixture(scope="session")
def captioner():
    """The golden checkpoint: the original's layout and numbers, random weights."""
    import capkit

    return capkit.load_captioner(GOLDEN, device="cpu")


@pytest.fixture
def static(captioner, monkeypatch):
    """A captioner that decodes as on a GPU, with caches so small that captions outgrow them."""
    import capkit

    monkeypatch.setattr("capkit.captioning.graphs.STATIC_DEVICES", ("cpu",))
    monkeypatch.setattr("capkit.captioning.graphs.STATIC_POSITIONS", 8)
    monkeypatch.setattr("capkit.captioning.graphs.FIRST_TOKENS", 4)
    return capkit.Captioner(captioner.model, captioner.processor)


@pytest.fixture
def new_captioner():
    """Another `captioner` for a test that lets memory run out: a captioner remembers what was too much for it."""
    import capkit

    return capkit.load_captioner(GOLDEN, device="cpu")


@pytest.fixture
def golden_copy(tmp_path):
    """A copy of the golden checkpoint, to damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("golden.*", "sampling.json"))
    return folder


@pytest.fixture
def random_clip():
    """Makes clips of noise: random_clip(num_frames, seed)."""
    import capkit

    def make(num_frames=3, seed=0, height=40, width=60):
        frames = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
        return capkit.Clip.from_frames(frames)

    return make


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """Notebooks 01 to 03, each run once for all tests that look at it: executed("01") as `test_notebooks.run`.

    Returns folder, notebook and what it showed. What a test then does in the folder is its own affair.
    """
    from notebook_runner import FAST, run

    few = {"01": FAST, "02": FAST | {"limit": 2}, "03": {"limit": 3}}

    @functools.cache
    def execute(name):
        folder = tmp_path_factory.mktemp(name)
        return folder, *run(name, folder, **few[name])

    return execute
