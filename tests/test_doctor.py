"""The doctor, on made-up patients: packages that are only metadata, drivers that are only a script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capkit import doctor
from capkit.video import reading


@pytest.fixture
def patient(tmp_path, monkeypatch):
    """Puts packages before those that are installed, and programs before those on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)
    return Patient(tmp_path)


class Patient:
    def __init__(self, folder):
        self.folder = folder

    def install(self, name, version, requires=(), code=None):
        """Metadata of a package, and a module of its name if it is to have any."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]) + "\n")
        if code is not None:
            (self.folder / f"{name}.py").write_text(code)

    def program(self, name, script):
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def gpu(self, name="NVIDIA Old", megabytes=24576, driver="525.1", capability="8.6", cuda="12.0"):
        """An nvidia-smi that knows one GPU."""
        row = f'echo "{name}, {megabytes}, {driver}, {capability}"'
        self.program("nvidia-smi", f'case "$1" in --query*) {row};; *) echo "| CUDA Version: {cuda} |";; esac')

    def torch(self, cuda="'13.0'", available=False, architectures=("sm_75", "sm_90")):
        """A torch that says so of itself, and a model that need not be loaded."""
        self.install(
            "torch",
            "2.13.0",
            code="import types\n__version__ = '2.13.0'\n"
            f"version = types.SimpleNamespace(cuda={cuda}, hip=None)\n"
            f"cuda = types.SimpleNamespace(is_available=lambda: {available}, "
            f"get_arch_list=lambda: {list(architectures)})\n",
        )


def look(check, *arguments):
    return list(check(*arguments))


def told(findings, level):
    return [finding.text + " -> " + finding.remedy for finding in findings if finding.level == level]


def test_as_it_is_here():
    """The real thing, in a process of its own: the tests' environment is sound."""
    run = subprocess.run([sys.executable, "-m", "capkit", "doctor"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the model, PyAV and decord can be imported" in run.stdout.replace("\n         ", " ")
    assert "notebooks run in this Python" in run.stdout and "WRONG" not in run.stdout
    assert doctor.DECORD_VERSION == reading.DECORD_VERSION


def test_importing_it_needs_nothing():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import capkit.doctor; print(*sys.modules)"
    root = str(Path(doctor.__file__).parents[1])
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True, check=True)
    assert "capkit.doctor" in run.stdout and "numpy" not in run.stdout.split()


def test_without_any_package_it_says_what_is_missing():
    root = str(Path(doctor.__file__).parents[1])
    code = "import sys; sys.path.insert(0, sys.argv[1]); from capkit.doctor import run_command; sys.exit(run_command())"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True)
    assert run.returncode == 1 and not run.stderr
    assert "packaging is missing" in run.stdout and "torch cannot be imported: ModuleNotFoundError" in run.stdout


@pytest.mark.parametrize(
    "name, version, words",
    [
        ("transformers", "4.43.4", "transformers 4.43.4: capkit needs <6,>=5.17; capkit is written for the interfaces"),
        ("transformers", "6.0.0", "transformers 6.0.0: capkit needs <6,>=5.17"),
        ("decord", "0.5.0", "decord 0.5.0: capkit needs ==0.6.0; other versions may return wrong frames"),
        ("torch", "2.1.0", "torch 2.1.0: capkit needs >=2.6"),
    ],
)
def test_a_package_too_old_or_too_new(patient, name, version, words):
    patient.install(name, version)
    (wrong,) = told(look(doctor.check_requirements), "wrong")
    assert words in wrong and f"-> pip install -c constraints.txt '{name}" in wrong


def test_packages_and_extras_that_are_missing(patient):
    wanted = ["torch>=2.6", "notthere>=3", "elsewhere; sys_platform == 'amiga'", "northere; extra == 'metrics'"]
    patient.install("capkit", "9.9", wanted)
    found = look(doctor.check_requirements)
    assert told(found, "wrong") == ["notthere is missing -> pip install -c constraints.txt 'notthere>=3'"]
    (note,) = told(found, "note")
    assert note.startswith("no BLEU and chrF against reference captions: northere missing -> pip install")
    assert "capkit 9.9" in told(found, "ok")[0] and "1 of the packages it needs: torch" in told(found, "ok")[0]


def test_packages_that_take_decords_name_or_were_made_for_another_torch(patient):
    patient.install("decord2", "3.0.1")
    patient.install("torchvision", "0.17.0", ["numpy", "torch==2.2.0"])
    patient.install("xformers", "0.0.27", ["torch==2.4.0", "numpy; extra == 'no'"])
    patient.install("pytorchvideo", "0.1.5")
    patient.install("flash-attn", "2.6.0", ["torch"])
    found = look(doctor.check_conflicts)
    shadow, vision = told(found, "wrong")
    assert (
        "decord2 3.0.1 is imported as decord" in shadow and "pip uninstall decord2, then pip install --force" in shadow
    )
    assert "torchvision 0.17.0 clashes with torch " in vision and "(it wants ==2.2.0)" in vision
    notes = told(found, "note")
    assert [text.split()[0] for text in notes] == ["xformers", "pytorchvideo", "flash-attn"]
    assert "clashes with torch" in notes[0] and "FlashAttention off" in notes[2]


def test_a_decord_that_is_another_and_a_torch_that_crashes(patient):
    patient.install("decord", "0.6.0", code="__version__ = '3.0.1'")
    patient.torch()
    patient.install("av", "18.1.0", code="raise ImportError('libavcodec.so: no such file')")
    wrong = told(look(doctor.check_imports, doctor.probe()), "wrong")
    assert any("av cannot be imported: ImportError: libavcodec.so" in text for text in wrong)
    assert any(
        "the decord that is imported is 3.0.1, not 0.6.0 -> pip install --force-reinstall" in text for text in wrong
    )
    (patient.folder / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (wrong,) = told(look(doctor.check_imports, doctor.probe()), "wrong")
    assert wrong.startswith("importing torch ended the process")


NO_CUDA = {"version": "2.13.0+cpu", "cuda": None, "hip": None, "available": False, "architectures": []}
CUDA = NO_CUDA | {"version": "2.13.0", "cuda": "13.0"}
WORKING = CUDA | {"available": True, "architectures": ["sm_75", "sm_90", "compute_90"]}


def test_gpus(patient, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    patient.program("nvidia-smi", "echo No devices were found; exit 6")
    assert "no NVIDIA GPU is seen: the demo model runs on the CPU" in told(look(doctor.check_gpu, NO_CUDA), "note")[0]
    patient.program("nvidia-smi", "echo 'Driver/library version mismatch'; exit 9")
    assert "Driver/library version mismatch" in told(look(doctor.check_gpu, CUDA), "wrong")[0]
    patient.gpu()
    assert "built without CUDA: it will not use the NVIDIA Old" in told(look(doctor.check_gpu, NO_CUDA), "wrong")[0]
    (wrong,) = told(look(doctor.check_gpu, CUDA), "wrong")
    assert "driver 525.1 goes up to CUDA 12.0, and torch 2.13.0 is built for CUDA 13.0 -> update" in wrong
    patient.gpu(cuda="13.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in told(look(doctor.check_gpu, CUDA), "wrong")[0]


@pytest.mark.parametrize(
    "megabytes, advice",
    [
        (12288, "take a larger GPU"),
        (16384, 'load it with quantization="4bit"'),
        (24576, 'load it with quantization="8bit"'),
        (81920, None),
    ],
)
def test_gpus_by_their_memory(patient, megabytes, advice):
    patient.gpu(megabytes=megabytes)
    found = look(doctor.check_gpu, WORKING)
    assert [text.split(" -> ")[1] for text in told(found, "note")] == ([advice] if advice else [])
    assert not told(found, "wrong") and f"{megabytes * 2**20 / 1e9:.0f} GB" in told(found, "ok")[0]


def test_a_gpu_that_torch_has_no_code_for(patient):
    patient.gpu(capability="6.1", megabytes=81920)
    assert (
        "has no code for the NVIDIA Old (compute capability 6.1)" in told(look(doctor.check_gpu, WORKING), "wrong")[0]
    )


def test_disk(patient, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(patient.folder / "hub" / "deep"))
    usage = type("Usage", (), {"free": 3_000_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    (note,) = told(look(doctor.check_disk), "note")
    assert (
        "no room for the published checkpoint (another 25 GB)" in note and "3.0 GB free" in note and "HF_HOME" in note
    )
    usage.free = 500_000_000
    assert "has only 0.50 GB free for results" in told(look(doctor.check_disk), "wrong")[0]
    usage.free = 50_000_000_000
    assert {finding.level for finding in look(doctor.check_disk)} == {"ok"}
    usage.free = 3_000_000_000
    blobs = patient.folder / "hub" / "deep" / "models--THUDM--cogvlm2-llama3-caption" / "blobs"
    blobs.mkdir(parents=True)
    with open(blobs / "weights", "wb") as file:
        file.truncate(24_900_000_000)  # takes no room
    assert {finding.level for finding in look(doctor.check_disk)} == {"ok"}


def test_a_kernel_of_another_python(patient, tmp_path):
    spec = patient.folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    for command, level in (("/usr/bin/env", "wrong"), ("/no/such/python", "wrong"), ("python3", "ok"), (None, "wrong")):
        argv = [command, "-m", "ipykernel_launcher"] if command else []
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
        (found,) = look(doctor.check_kernel)
        assert found.level == level, command
    assert str(spec) in found.text and "ipykernel install" in found.remedy
    (spec / "kernel.json").write_text("{")
    assert "Jupyter has no kernel python3 that can be read" in look(doctor.check_kernel)[0].text
