"""The installation check, with packages that are only metadata, a torch that is only names, an nvidia-smi script."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from capkit import doctor
from capkit.video import decord_frames


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Adds the metadata of a package, and a module of its name if it has code, in front of what is installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name, version, requires=(), code=None):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]) + "\n")
        if code is not None:
            (tmp_path / f"{name}.py").write_text(code)
            monkeypatch.setitem(sys.modules, name, None)  # so that undoing it removes what the check imports
            del sys.modules[name]

    return install


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a script nvidia-smi with this output and exit code on the path."""
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])

    def write(output, code=0):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{output}'; exit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return write


@pytest.fixture
def torch_with(monkeypatch):
    """Replaces torch by one that was built for this version of CUDA and sees these GPUs."""

    def replace(cuda, gpus=()):
        seen = SimpleNamespace(is_available=lambda: bool(gpus), get_device_properties=lambda index: gpus[index])
        fake = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda), cuda=seen)
        monkeypatch.setitem(sys.modules, "torch", fake)

    return replace


def findings(check, level):
    return [f"{finding.text} -> {finding.remedy}" for finding in check() if finding.level == level]


def test_the_environment_of_the_tests_has_no_problems():
    run = subprocess.run([sys.executable, "-m", "capkit", "doctor"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "torch, PyAV and the model can be imported" in run.stdout and "No problems found." in run.stdout
    assert "pip check" in run.stdout and "python -m torch.utils.collect_env" in run.stdout
    assert doctor.DECORD_VERSION == decord_frames.DECORD_VERSION


def test_without_any_package_it_says_what_is_missing():
    root = str(Path(doctor.__file__).parents[1])
    code = "import sys; sys.path.insert(0, sys.argv[1]); from capkit.doctor import run_command; sys.exit(run_command())"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True)
    assert run.returncode == 1 and not run.stderr
    assert "No module named 'packaging'" in run.stdout and "torch cannot be imported: ModuleNotFoundError" in run.stdout


@pytest.mark.parametrize(
    "name, version, words",
    [
        ("transformers", "4.43.4", "transformers 4.43.4 is installed; capkit needs transformers<6,>=5.17"),
        ("transformers", "6.0.0", "transformers 6.0.0 is installed; capkit needs transformers<6,>=5.17"),
        ("decord", "0.5.0", "decord 0.5.0 is installed; capkit needs decord==0.6.0"),
        ("torch", "2.1.0", "torch 2.1.0 is installed; capkit needs torch>=2.6"),
    ],
)
def test_a_package_too_old_or_too_new(install, name, version, words):
    install(name, version)
    (wrong,) = findings(doctor.check_packages, "wrong")
    assert words in wrong and f"-> pip install -c constraints.txt '{name}" in wrong


def test_packages_and_extras_that_are_missing(install):
    wanted = ["torch>=2.6", "notthere>=3", "elsewhere; sys_platform == 'amiga'", "northere; extra == 'metrics'"]
    install(doctor.DISTRIBUTION, "9.9", wanted)
    (wrong,) = findings(doctor.check_packages, "wrong")
    assert wrong == "notthere is missing; capkit needs notthere>=3 -> pip install -c constraints.txt 'notthere>=3'"
    (note,) = findings(doctor.check_packages, "note")
    assert note.startswith("northere is missing: no BLEU and chrF") and note.endswith("-e '.[metrics]'")
    assert "capkit 9.9" in findings(doctor.check_packages, "ok")[0]


def test_packages_that_replace_decord(install):
    install("decord2", "3.0.1")
    install("decord", "0.6.0", code="__version__ = '3.0.1'")
    replaced, version = findings(doctor.check_decord, "wrong")
    assert "decord2 3.0.1 is imported as decord" in replaced and "pip uninstall decord2, then pip install" in replaced
    assert "version 3.0.1, not 0.6.0 -> pip install --force-reinstall" in version


def test_a_decord_whose_files_are_gone(install):
    install("decord", "0.6.0", code="raise ImportError('libdecord.so: no such file')")
    (wrong,) = findings(doctor.check_decord, "wrong")
    assert "ImportError: libdecord.so: no such file" in wrong and "-> pip install --force-reinstall" in wrong


def test_a_package_that_cannot_be_imported(install):
    install("av", "18.1.0", code="raise ImportError('libavcodec.so: no such file')")
    (wrong,) = findings(doctor.check_imports, "wrong")
    assert "av cannot be imported: ImportError: libavcodec.so" in wrong and not findings(doctor.check_imports, "ok")


def test_no_gpu_or_one_that_works(torch_with, nvidia_smi):
    torch_with(cuda=None)
    nvidia_smi("No devices were found", code=6)
    assert "no NVIDIA GPU: the demo model runs on the CPU" in findings(doctor.check_gpu, "note")[0]
    torch_with("13.0", gpus=[SimpleNamespace(name="NVIDIA New", total_memory=80e9)])
    assert "torch 2.13.0 can use the GPU: NVIDIA New, 80 GB" in findings(doctor.check_gpu, "ok")[0]


@pytest.mark.parametrize(
    "cuda, output, code, words",
    [
        ("13.0", "Driver/library version mismatch", 9, "Driver/library version mismatch"),
        (None, "CUDA Version: 12.0", 0, "torch 2.13.0 is built without CUDA"),
        ("13.0", "CUDA Version: 12.0", 0, "supports CUDA 12.0, and torch 2.13.0 is built for CUDA 13.0 -> update"),
        ("13.0", "CUDA Version: 13.1", 0, "CUDA_VISIBLE_DEVICES is ''"),
    ],
)
def test_a_gpu_that_torch_cannot_use(torch_with, nvidia_smi, monkeypatch, cuda, output, code, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch_with(cuda)
    nvidia_smi(output, code)
    (wrong,) = findings(doctor.check_gpu, "wrong")
    assert words in wrong
