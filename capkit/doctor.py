"""Check the installation: `python -m capkit doctor`.

Reports what pip and torch do not: package versions that capkit cannot use, packages that replace decord, and a torch
that cannot use the GPU. Importing this module needs no installed package.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

DISTRIBUTION = "cogvlm2-capkit"
DECORD_VERSION = "0.6.0"  # as in capkit.video.decord_frames, which needs numpy
DECORD_IMPOSTORS = ("decord2", "eva-decord")  # imported under the name decord, too
INSTALL = "pip install -c constraints.txt"
REINSTALL_DECORD = f"pip install --force-reinstall --no-deps decord=={DECORD_VERSION}"
EXTRAS = {
    "quantize": "8- and 4-bit loading",
    "train": "training the demo model (notebook 07)",
    "metrics": "BLEU and chrF against reference captions",
    "ray": "captioning on a Ray cluster",
    "shots": "cutting films where their shots change",
}


class Finding(NamedTuple):
    """Result of a check. Levels: "ok"; "note", an optional feature is unavailable; "wrong", something will fail."""

    level: str
    text: str
    remedy: str = ""


def run_command() -> int:
    """Print all findings; returns the exit code: 1 if one of them is "wrong", else 0."""
    num_wrong = 0
    for check in (check_packages, check_decord, check_imports, check_gpu):
        for level, text, remedy in check():
            num_wrong += level == "wrong"
            print(f"{level.upper() if level == 'wrong' else level:6}{text}" + (remedy and f"\n      -> {remedy}"))
    print(f"\n{num_wrong} problems found." if num_wrong else "\nNo problems found.")
    print("Further checks: pip check (conflicts between packages), python -m torch.utils.collect_env (versions, CUDA)")
    return 1 if num_wrong else 0


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with the requirements in capkit's metadata."""
    folder = Path(__file__).parents[1]
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except ImportError as error:  # packaging is missing, or capkit was copied and not installed
        yield Finding("wrong", f"{folder} is not installed: {error}", f"in that folder: {INSTALL} -e .")
        return
    for requirement in requirements:
        name, specifier, marker = requirement.name, requirement.specifier, requirement.marker
        extras = [extra for extra in ("", *EXTRAS) if marker is None or marker.evaluate({"extra": extra})]
        version = _version(name)
        if not extras or version and specifier.contains(version, prereleases=True):
            continue  # not required on this platform or only by developers; or installed
        state = f"{name} {version} is installed" if version else f"{name} is missing"
        if extras[0]:
            yield Finding("note", f"{state}: no {EXTRAS[extras[0]]}", f"{INSTALL} -e '.[{extras[0]}]'")
        else:
            yield Finding("wrong", f"{state}; capkit needs {name}{specifier}", f"{INSTALL} '{name}{specifier}'")
    yield Finding("ok", f"capkit {_version(DISTRIBUTION)} in {folder}, Python {platform.python_version()}")


def check_decord() -> Iterator[Finding]:
    """Find packages that are imported as decord but return wrong frames, and a decord that they have damaged."""
    for name in DECORD_IMPOSTORS:
        if version := _version(name):
            text = f"{name} {version} is imported as decord and returns wrong frames; capkit refuses to read with it"
            yield Finding("wrong", text, f"pip uninstall {name}, then {REINSTALL_DECORD}")
    if _version("decord") is None:
        return  # it has no wheel for every machine; where it is required, check_packages reports it
    try:
        version = importlib.import_module("decord").__version__
        if version != DECORD_VERSION:
            yield Finding("wrong", f"import decord imports version {version}, not {DECORD_VERSION}", REINSTALL_DECORD)
    except Exception as error:  # whatever a damaged package raises, AttributeError for example
        text = f"decord cannot be imported ({type(error).__name__}: {error}); uninstalling decord2 deletes its files"
        yield Finding("wrong", text, REINSTALL_DECORD)


def check_imports() -> Iterator[Finding]:
    """Import torch, PyAV and the model code."""
    for name in ("torch", "av", "capkit.captioning"):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a damaged package or a clash of versions raises
            text = f"{name} cannot be imported: {type(error).__name__}: {error}"
            yield Finding("wrong", text, "pip check, then reinstall the packages that it names")
            return
    yield Finding("ok", "torch, PyAV and the model can be imported")


def check_gpu() -> Iterator[Finding]:
    """Check that torch can use the NVIDIA GPU, if there is one: CUDA build, driver, visible devices."""
    try:
        import torch
    except Exception:  # reported by check_imports
        return
    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        yield Finding("ok", f"{build} can use the GPU: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB")
        return
    try:
        run = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, errors="replace")
        output, failed = " ".join((run.stdout + run.stderr).split()), run.returncode != 0
    except FileNotFoundError:
        output, failed = "no devices", False
    except (OSError, subprocess.TimeoutExpired) as error:
        output, failed = str(error), True
    driver = re.search(r"CUDA Version: *([\d.]+)", output)
    if "no devices" in output.lower():
        yield Finding("note", "no NVIDIA GPU: the demo model runs on the CPU, the published model needs a GPU")
    elif failed:
        yield Finding("wrong", f"nvidia-smi fails: {output}", "repair the NVIDIA driver, or restart the machine")
    elif torch.version.cuda is None:
        remedy = "on Linux pip uninstall torch, then make; elsewhere the command that pytorch.org gives"
        yield Finding("wrong", f"{build} is built without CUDA and cannot use the GPU", remedy)
    elif driver and int(driver[1].split(".")[0]) < int(torch.version.cuda.split(".")[0]):
        text = f"the driver supports CUDA {driver[1]}, and {build} is built for CUDA {torch.version.cuda}"
        yield Finding("wrong", text, f"update the NVIDIA driver, or install a torch that is built for CUDA {driver[1]}")
    else:
        text = f"{build} cannot use the GPU; CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        yield Finding("wrong", text, 'python -c "import torch; torch.zeros(1).cuda()" shows the error')


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
