"""What is installed, what is missing or in conflict, and what to do: `python -m capkit doctor`.

Nothing heavy is imported here: versions come from the packages' metadata, and whether they can be imported is tried in
a child process, which may crash.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

DECORD_VERSION = "0.6.0"  # as in capkit.video.reading, which cannot be imported without numpy
OLDEST_PYTHON = (3, 10)
CHECKPOINT_NAME = "THUDM/cogvlm2-llama3-caption"
CHECKPOINT_BYTES = 25_000_000_000
GPU_GIGABYTES = {"as it is": 25, 'with quantization="8bit"': 18, 'with quantization="4bit"': 15}  # weights alone
RESULT_BYTES = 1_000_000_000  # a store of 10,000 captions with its strips takes less
PROBE_SECONDS = 300  # a first import from a slow network disk takes minutes
CONSTRAINED = "pip install -c constraints.txt"

REASONS = {
    "transformers": "capkit is written for the interfaces of transformers 5",
    "decord": "other versions may return wrong frames in silence",
}
SHADOWS = ("decord2", "eva-decord")  # imported as decord too
RELICS = {
    "torchvision": "transformers imports it where it is installed",
    "torchaudio": "capkit does not use it",
    "xformers": "the original needs it, capkit does not",
    "pytorchvideo": "the original needs it, capkit does not",
    "flash-attn": "capkit leaves FlashAttention off: it takes the model's repeated positions for packed sequences",
}
EXTRAS = {
    "quantize": "8- and 4-bit loading",
    "train": "notebook 07, training the demo model",
    "metrics": "BLEU and chrF against reference captions",
    "ray": "captioning on a cluster",
}
# Each on a line of its own, so that what came before a crash is known.
PROBE = """
import json

def look_at(name, look):
    try:
        told = look()
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print("PROBE " + json.dumps({name: told}), flush=True)

def torch():
    import torch, warnings
    warnings.simplefilter("ignore")
    told = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    told["available"] = torch.cuda.is_available()
    told["architectures"] = torch.cuda.get_arch_list()
    return told

def version(name):
    return lambda: {"version": __import__(name).__version__}

def capkit():
    import capkit.captioning.captioner
    return {"file": capkit.__file__}

look_at("torch", torch)
look_at("av", version("av"))
look_at("decord", version("decord"))
look_at("capkit", capkit)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok"; "note", where something cannot be done that not everybody needs; "wrong", where something will
            fail.
        text: what was found.
        remedy: what to do; "" where that is nothing.
    """

    level: str
    text: str
    remedy: str = ""


def run_command() -> int:
    """Print all findings; returns the exit code, 1 if something will not work, else 0."""
    findings = []
    for finding in examine():
        findings.append(finding)
        mark = {"ok": "ok    ", "note": "note  ", "wrong": "WRONG "}[finding.level]
        for start, text in ((mark, finding.text), ("      -> ", finding.remedy)):
            if text:
                print(textwrap.fill(text, 118, initial_indent=start, subsequent_indent=" " * len(start)), flush=True)
    wrong = sum(finding.level == "wrong" for finding in findings)
    print(f"\n{wrong} things will not work" if wrong else "\nNothing stands in the way.")
    return 1 if wrong else 0


def examine() -> Iterator[Finding]:
    """Everything that bears on capkit's running here, as it is found; it takes about as long as importing torch."""
    yield from check_python()
    yield from check_requirements()
    yield from check_conflicts()
    probed = probe()
    yield from check_imports(probed)
    yield from check_gpu(probed.get("torch", {}))
    yield from check_disk()
    yield from check_kernel()


def check_python() -> Iterator[Finding]:
    """Whether this Python is new enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("wrong", f"Python {version} is too old: capkit needs 3.10 or later", "make PYTHON=python3.11")
    else:
        yield Finding("ok", f"Python {version} ({sys.executable})")


def check_requirements() -> Iterator[Finding]:
    """What capkit's own metadata asks for, against what is installed."""
    here = Path(__file__).parents[1]
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in metadata.requires("capkit") or ()]
    except ImportError:
        yield Finding(
            "wrong", "packaging is missing, without which versions cannot be compared", f"{CONSTRAINED} packaging"
        )
        return
    except metadata.PackageNotFoundError:
        yield Finding(
            "wrong", f"capkit is imported from {here}, but not installed", f"in that folder: {CONSTRAINED} -e ."
        )
        return
    there = []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        version, reason = _version(one.name), REASONS.get(one.name)
        remedy = f"{CONSTRAINED} '{one.name}{one.specifier}'"
        if version is None:
            yield Finding("wrong", f"{one.name} is missing", remedy)
        elif not one.specifier.contains(version, prereleases=True):
            told = f"{one.name} {version}: capkit needs {one.specifier}" + (f"; {reason}" if reason else "")
            yield Finding("wrong", told, remedy)
        else:
            there.append(f"{one.name} {version}")
    yield Finding(
        "ok", f"capkit {_version('capkit')} from {here}; {len(there)} of the packages it needs: {', '.join(there)}"
    )
    for extra, purpose in EXTRAS.items():
        lacking = [
            one.name
            for one in wanted
            if one.marker is not None
            and one.marker.evaluate({"extra": extra})
            and not one.marker.evaluate({"extra": ""})
            and _version(one.name) is None
        ]
        if lacking:
            yield Finding("note", f"no {purpose}: {', '.join(lacking)} missing", f"{CONSTRAINED} 'capkit[{extra}]'")


def check_conflicts() -> Iterator[Finding]:
    """Packages that take decord's name, and relics of the original's stack that were made for another torch."""
    for name in SHADOWS:
        if version := _version(name):
            told = f"{name} {version} is imported as decord, and returns wrong frames: capkit refuses to read with it"
            yield Finding("wrong", told, f"pip uninstall {name}, then {_decord_again()}")
    if _version("decord") and importlib.util.find_spec("decord") is None:
        told = "decord's files are gone, though pip thinks it installed: uninstalling decord2 takes them along"
        yield Finding("wrong", told, _decord_again())
    for name, why in RELICS.items():
        version = _version(name)
        clashes = list(_clashes(name)) if version else []
        if clashes:
            level = "wrong" if name == "torchvision" else "note"
            told = f"{name} {version} clashes with {' and '.join(clashes)}; {why}"
            yield Finding(level, told, f"pip uninstall {name}, or install the version that belongs to this torch")
        elif version and name != "torchvision" and name != "torchaudio":
            yield Finding(
                "note", f"{name} {version} is installed: {why}", f"pip uninstall {name}, if nothing else needs it"
            )


def _clashes(name: str) -> Iterator[str]:
    """What of torch, transformers and numpy a package was not made for, by its own metadata."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return
    for line in metadata.requires(name) or ():
        one = Requirement(line)
        version = _version(one.name) if one.name in ("torch", "transformers", "numpy") else None
        if version and (one.marker is None or one.marker.evaluate({"extra": ""})):
            if not one.specifier.contains(version, prereleases=True):
                yield f"{one.name} {version} (it wants {one.specifier})"


def probe() -> dict[str, dict]:
    """What a child process sees when it imports torch, av, decord and capkit's model: by name, a mapping that may hold
    `error`; those after a crash are missing."""
    start = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); exec(sys.argv[2])"
    told = _run([sys.executable, "-c", start, json.dumps(sys.path), PROBE], PROBE_SECONDS)
    lines = [line for line in (told.stdout if told else "").splitlines() if line.startswith("PROBE ")]
    return {name: said for line in lines for name, said in json.loads(line.removeprefix("PROBE ")).items()}


def check_imports(probed: dict[str, dict]) -> Iterator[Finding]:
    """Whether what is installed can be imported, and is what it says.

    Args:
        probed: from `probe`.
    """
    for name in ("torch", "av", "decord", "capkit"):
        if name == "decord" and _version(name) is None:
            continue  # it has no wheel for every machine, and where it is wanted it was missed before
        if name not in probed:
            yield Finding("wrong", f"importing {name} ended the process or took longer than {PROBE_SECONDS} s")
            return
        if error := probed[name].get("error"):
            told = "capkit's model" if name == "capkit" else name
            again = _decord_again() if name == "decord" else f"{CONSTRAINED} --force-reinstall {name}"
            remedy = "see above for what it lacks or clashes with" if name == "capkit" else again
            yield Finding("wrong", f"{told} cannot be imported: {error}", remedy)
    if (version := probed.get("decord", {}).get("version", DECORD_VERSION)) != DECORD_VERSION:
        yield Finding("wrong", f"the decord that is imported is {version}, not {DECORD_VERSION}", _decord_again())
    if "file" in probed.get("capkit", {}):
        yield Finding("ok", "the model, PyAV and decord can be imported")


def check_gpu(torch: dict[str, Any]) -> Iterator[Finding]:
    """Whether there is a GPU, torch can use it, and the published model fits into it.

    Args:
        torch: what `probe` found out about it; empty where it cannot be imported.
    """
    cards, trouble = _cards()
    version = f"torch {torch.get('version')}"
    if trouble:
        yield Finding("wrong", f"nvidia-smi cannot reach the GPU: {trouble}", "repair the NVIDIA driver, or restart")
    elif torch.get("available") and (torch.get("hip") or not cards):
        yield Finding("ok", f"{version} sees a GPU")
    elif not cards:
        told = "no NVIDIA GPU is seen: the demo model runs on the CPU, the published one needs a GPU"
        yield Finding(
            "note", told, f"a GPU with {min(GPU_GIGABYTES.values())} GB or more, for captions worth believing"
        )
    elif "version" not in torch:
        return  # said before
    elif torch.get("cuda") is None:
        told = f"{version} is built without CUDA: it will not use the {cards[0][0]}"
        remedy = "on Linux pip uninstall torch, then make; elsewhere the command that pytorch.org gives"
        yield Finding("wrong", told, remedy)
    elif not torch["available"]:
        yield _no_cuda(version, torch["cuda"], cards[0])
    else:
        yield from _sizes(cards, torch["architectures"], version)


def _cards() -> tuple[list[tuple[str, float, str, str]], str]:
    """(name, memory in GB, driver, compute capability) of each NVIDIA GPU; and what is wrong, if anything is."""
    if shutil.which("nvidia-smi") is None:
        return [], ""
    fields = "--query-gpu=name,memory.total,driver_version,compute_cap"
    told = _run(["nvidia-smi", fields, "--format=csv,noheader,nounits"])
    rows = [line.split(", ") for line in told.stdout.splitlines()] if told and told.returncode == 0 else []
    if rows and all(len(row) == 4 for row in rows):
        return [(row[0], float(row[1]) * 2**20 / 1e9 if row[1].isdigit() else 0.0, *row[2:]) for row in rows], ""
    said = " ".join((told.stdout + told.stderr).split()) if told else "it does not answer"
    return [], "" if "no devices" in said.lower() else said or "it says nothing"


def _no_cuda(version: str, built_for: str, card: tuple) -> Finding:
    told = _run(["nvidia-smi"])
    supported = re.search(r"CUDA Version: *([\d.]+)", told.stdout if told else "")
    if supported and _numbers(supported[1])[:1] < _numbers(built_for)[:1]:
        told = f"driver {card[2]} goes up to CUDA {supported[1]}, and {version} is built for CUDA {built_for}"
        return Finding(
            "wrong", told, f"update the NVIDIA driver, or install a torch that is built for CUDA {supported[1]}"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
    remedy = 'python -c "import torch; torch.zeros(1).cuda()" says why'
    return Finding("wrong", f"{version} (CUDA {built_for}) cannot use the {card[0]}, driver {card[2]}{why}", remedy)


def _sizes(cards: list[tuple], architectures: list[str], version: str) -> Iterator[Finding]:
    oldest = min((int(name[3:]) for name in architectures if re.fullmatch(r"sm_\d+", name)), default=0)
    for name, gigabytes, driver, capability in cards:
        yield Finding("ok", f"{name}, {gigabytes:.0f} GB, driver {driver}, {version}")
        if _numbers(capability) and int("".join(map(str, _numbers(capability)))) < oldest:
            told = f"{version} has no code for the {name} (compute capability {capability})"
            yield Finding("wrong", told, "install an older torch that has; see the table on pytorch.org")
        ways = [way for way, needed in GPU_GIGABYTES.items() if needed * 1.05 <= gigabytes]
        if "as it is" not in ways:
            told = f"the published model, {GPU_GIGABYTES['as it is']} GB, does not fit into the {name}"
            yield Finding("note", told, f"load it {ways[0]}" if ways else "take a larger GPU")


def check_disk() -> Iterator[Finding]:
    """Room for the published checkpoint in the Hugging Face cache, and for results in the current folder."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    blobs = cache / f"models--{CHECKPOINT_NAME.replace('/', '--')}" / "blobs"
    lacking = CHECKPOINT_BYTES - sum(file.stat().st_size for file in blobs.glob("*"))
    free, writable = _room(cache)
    if lacking > CHECKPOINT_BYTES // 100 and (free < lacking or not writable):
        room = f"has {free / 1e9:.1f} GB free" if writable else "cannot be written to"
        told = f"no room for the published checkpoint (another {lacking / 1e9:.0f} GB): {cache} {room}"
        yield Finding(
            "note", told, "set HF_HOME to a folder on a larger disk, or put the checkpoint in a folder and name that"
        )
    else:
        yield Finding("ok", f"room for the published checkpoint in {cache}, or it is there")
    free, writable = _room(Path.cwd())
    if not writable:
        yield Finding("note", f"{Path.cwd()} cannot be written to", "give the notebooks an output_dir elsewhere")
    elif free < RESULT_BYTES:
        yield Finding(
            "wrong", f"{Path.cwd()} has only {free / 1e9:.2f} GB free for results", "make room, or go elsewhere"
        )
    else:
        yield Finding("ok", f"{free / 1e9:.0f} GB free for results in {Path.cwd()}")


def _room(folder: Path) -> tuple[int, bool]:
    """Free bytes where a folder is or would be made, and whether it can be written to."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free, os.access(there, os.W_OK)


def check_kernel() -> Iterator[Finding]:
    """Whether notebooks run in this Python: a kernel of the same name, installed by another, is a common trap."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        spec = KernelSpecManager().get_kernel_spec("python3")
    except Exception as error:  # a damaged kernel.json raises whatever its reader does
        told = f"Jupyter has no kernel python3 that can be read: {type(error).__name__}: {error}"
        yield Finding("wrong", told, f"{CONSTRAINED} ipykernel")
        return
    command = spec.argv[0] if spec.argv else ""
    plain = ("python", "python3", f"python{sys.version_info[0]}.{sys.version_info[1]}")  # jupyter_client takes its own
    program = sys.executable if command in plain else shutil.which(command)
    if program is None or Path(program).parent.resolve() != Path(sys.executable).parent.resolve():
        told = f"notebooks run in another Python: the kernel python3 in {spec.resource_dir} starts {command}"
        remedy = f"delete that folder, or: {sys.executable} -m ipykernel install --prefix {sys.prefix} --name python3"
        yield Finding("wrong", told, remedy)
    else:
        yield Finding("ok", "notebooks run in this Python (kernel python3)")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _decord_again() -> str:
    return f"pip install --force-reinstall --no-deps decord=={DECORD_VERSION}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _run(command: list[str], timeout_seconds: float = 60) -> subprocess.CompletedProcess | None:
    """None where it cannot be started or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
