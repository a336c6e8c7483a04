"""What surrounds the code: packaging, README, licence."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from paths import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    requirements = map(Requirement, lines)
    return {r.name.lower(): str(r.specifier) for r in requirements if r.marker is None or r.marker.evaluate()}


def test_conda_environment_holds_the_projects_requirements():
    sections = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [section["pip"] for section in sections if isinstance(section, dict)]
    listed = [line for line in pip if not line.startswith("--")]
    assert {str(Requirement(line)) for line in listed} == {str(Requirement(line)) for line in PROJECT["dependencies"]}
    assert "--constraint constraints.txt" in pip and "--editable ." in pip


def test_what_is_installed_is_what_the_project_asks_for_and_what_is_pinned():
    pinned = pins("constraints.txt")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            installed = metadata.version(requirement.name)
            assert requirement.specifier.contains(installed), requirement
            assert pinned[requirement.name].removeprefix("==") == installed.split("+")[0], requirement


def test_the_oldest_transformers_is_the_one_that_the_project_allows():
    (transformers,) = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("transformers")]
    assert transformers.specifier.contains(pins("constraints-oldest.txt")["transformers"].removeprefix("=="))
    assert str(transformers.specifier).count(pins("constraints-oldest.txt")["transformers"].removeprefix("==")[:4])
    assert pins("constraints.txt")["torch"] == pins("constraints-oldest.txt")["torch"] == "==2.13.0"


def test_public_names_are_there_and_importing_capkit_is_cheap():
    code = "import capkit, sys; print(*sys.modules); [getattr(capkit, name) for name in capkit.__all__]"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "decord"} & set(loaded)


def test_an_unknown_name_is_an_attribute_error():
    import capkit

    with pytest.raises(AttributeError, match="no attribute 'load_clips'"):
        _ = capkit.load_clips
    assert "load_clip" in dir(capkit)


def test_rooms_are_attributes():
    code = "import capkit; print(capkit.cogvlm2.CogVLM2VideoProcessor.__name__, capkit.export.LAYOUTS['cogkit'].name)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["CogVLM2VideoProcessor", "cogkit"], run.stderr


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_examples_run_as_printed(example, tmp_path):
    """In an empty folder, with the clip that they name."""
    shown = re.search(r'(?:load_clip|find_clips)\("([^"]+)"', example)
    if shown:
        from video_factory import encode_clip

        encode_clip(tmp_path / shown[1], range(40), fps=10)
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_readmes_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in set(re.findall(r"\((notebooks/[^)]+|LICENSE|capkit/[^)]+)\)", README)):
        assert (ROOT / path).exists(), path


def test_command_line_shows_a_store(tmp_path):
    store = tmp_path / "captions.jsonl"
    store.write_text('{"request": "a", "video": "a.mp4", "status": "ok", "text": " A boat."}\n')
    with store.open("a") as file:
        file.write('{"request": "b", "video": "b.mp4", "status": "ok", "text": "A car.", "start_seconds": 2.5}\n')
        file.write('{"edits": "b", "text": "A red car."}\n')
    run = subprocess.run([sys.executable, "-m", "capkit", "show", store], capture_output=True, text=True)
    assert "a.mp4\n  A boat." in run.stdout and str(store) in run.stdout
    assert "b.mp4 (2.5 s to the end)\n  A red car." in run.stdout and "A car." not in run.stdout
    run = subprocess.run([sys.executable, "-m", "capkit", "show", tmp_path / "x"], capture_output=True, text=True)
    assert run.returncode == 2 and "no such file" in run.stderr
