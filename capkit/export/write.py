"""Write an export's folder atomically: beside its place, read back as the trainer does, and only then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tarfile import TarError

from capkit.export.layouts import Layout, Pair, shorten
from capkit.files import Busy, file_sha256, hold_lock

REPORT_BEGINS = b'{\n "layout": "'
NOT_READ = (ValueError, KeyError, IndexError, TypeError, OSError, TarError)
"""What reading a folder raises that holds something else than an export, or that a trainer would stop at."""
# What file systems without links answer, some of them Windows', or those of a link to another file system.
NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def report_of(root: Path) -> Path:
    """The file of an export's report: beside the root, because a trainer might take it for data inside."""
    return root.with_name(f"{root.name}.export.json")


class ExportBusy(Busy):
    """Another export is being written to this folder."""

    advice = "is exporting to this folder; wait for it, or choose another folder"


class ExportError(RuntimeError):
    """An export could not be written, or did not read back as it was written; nothing of it is kept."""


@contextmanager
def hold_folder(root: Path) -> Iterator[None]:
    """Keep other exports away from a root until the block ends, and first clear up what killed ones left beside it.

    Raises:
        ExportBusy: another process, or another thread of this one, is exporting to it.
    """
    with hold_lock(root, ExportBusy):
        for path in list(root.parent.iterdir()):
            if re.fullmatch(rf"\.{re.escape(report_of(root).name[:40])}\.[0-9a-f]{{8}}\.part", path.name):
                path.unlink()
            elif re.fullmatch(rf"\.{re.escape(root.name)}\.(part|old)-[a-z0-9_]{{8}}", path.name):  # of mkdtemp
                if (path / root.name).is_dir() and not root.exists():  # killed between the two renames
                    (path / root.name).rename(root)
                shutil.rmtree(path)
        yield


def is_exported(layout: Layout, root: Path, pairs: Sequence[Pair], clips: str, overwrite: bool) -> bool:
    """True if the root holds this very export, clips made as `clips` says; False if it may be written there.

    Raises:
        ValueError: the root holds something else, or the file that a report would replace is none.
    """
    if root == root.parent:
        raise ValueError(f"output_dir: {root} is the root of the file system; name a folder in it")
    if root.is_symlink() and not root.exists():
        raise ValueError(f"output_dir: {root} is a link to {os.readlink(root)!r}, which is not there")
    report = report_of(root)
    beside = [(report, REPORT_BEGINS, "the report goes")]
    if layout.config_suffix:
        beside.append((layout.config_path(root), b"capkit", "the trainer's settings go"))
    for path, mark, what in beside:
        if os.path.lexists(path) and not (path.is_file() and mark in _first_bytes(path)):
            raise ValueError(f"output_dir: {path}, where {what}, is something else; choose another folder")
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return False
    if not root.is_dir():
        raise ValueError(f"output_dir: {root} is a file")
    for name in layout.latents:
        if (root / name).is_dir():
            raise ValueError(
                f"output_dir: {root} holds {name}/, which a trainer has computed from clips; it would use it for the "
                "new clips of the same names too. Delete it, or choose another folder"
            )
    names = []
    with suppress(*NOT_READ):
        for clip, *_ in layout.read(root):
            names.append(clip.name)
    own = layout.caption_files(names) | {(Path(layout.clip_folder) / name).as_posix() for name in names}
    if foreign := next((file for file in _files(root) if file not in own), ""):
        raise ValueError(f"output_dir: {root} holds {foreign!r}, not part of such an export; choose another folder")
    other = "other captions"
    if not _first_difference(layout, root, root, pairs):
        placed = [] if layout.packs_clips else pairs
        made = (_how_made(root / layout.clip_folder / pair.name, pair.clip) for pair in placed)
        if not (differing := next((way for way in made if way != clips), "")):
            return True
        other = f"this export with clips={differing!r}, not {clips!r}"
    if not overwrite:
        raise ValueError(f"output_dir: {root} holds {other}; choose another folder, or overwrite=True replaces it")
    return False


def _how_made(path: Path, clip: Path) -> str:
    """The `clips` of `write_export` that made this file from the clip."""
    return "link" if path.is_symlink() else "hardlink" if path.samefile(clip) else "copy"


def _files(root: Path) -> Iterator[str]:
    """The files and links below a root, relative to it."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in sorted([*names, *links]))


def write_export(layout: Layout, root: Path, pairs: Sequence[Pair], clips: str) -> None:
    """Write an export beside its place, read it back, and only then rename it.

    A process that is killed meanwhile leaves a hidden folder `.<name>.part-...`, which `hold_folder` removes.

    Args:
        layout: of the export.
        root: free, or may be replaced: see `is_exported`.
        pairs: clips and captions.
        clips: "link", "copy" or "hardlink".

    Raises:
        ExportError: it could not be written, or does not read back as it should.
    """
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{root.name}.part-", dir=root.parent))
    except OSError as error:
        raise ExportError(f"{root.parent}: cannot be written to: {error}") from error
    try:
        part.chmod(0o755)
        place: dict[str, Callable[[Path, Path], object]]
        place = {"link": os.symlink, "copy": shutil.copyfile, "hardlink": os.link}
        (part / layout.clip_folder).mkdir(parents=True, exist_ok=True)
        for pair in [] if layout.packs_clips else pairs:
            place[clips](pair.clip, part / layout.clip_folder / pair.name)
        layout.write(part, pairs)
        if difference := _first_difference(layout, part, root, pairs):
            raise ExportError(f"{root}: read back as {layout.trainer} reads it, {difference}; nothing was exported")
        _replace_folder(part, root)
    except OSError as error:
        hint = "; a copy (clips='copy') needs no links" if clips != "copy" and error.errno in NO_LINKS else ""
        raise ExportError(f"{root}: could not be written: {error}{hint}; nothing was exported") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _replace_folder(new: Path, root: Path) -> None:
    """Rename a folder to the root; an older one is missing only between two renames."""
    if root.exists() and not any(root.iterdir()):
        root.rmdir()
    if not root.exists():
        new.rename(root)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{root.name}.old-", dir=root.parent))
    root.rename(old / root.name)
    new.rename(root)
    shutil.rmtree(old)


def _first_difference(layout: Layout, folder: Path, root: Path, pairs: Sequence[Pair]) -> str:
    """What differs from the pairs when a folder that is or will be the root is read as its trainer does, or ""."""
    places = {pair.name: place for place, pair in enumerate(pairs)}  # of those not read yet
    clip_folders = [path / layout.clip_folder for path in (folder, root)]
    try:
        for clip, rows in groupby(layout.read(folder), key=itemgetter(0)):
            place = places.pop(clip.name, None) if clip.parent in clip_folders else None
            if place is None:
                return f"{clip.name} is not expected, or occurs twice"
            pair, [texts, *digests] = pairs[place], zip(*(row[1:] for row in rows), strict=True)
            if texts != pair.texts:
                found, wanted = (shorten(" | ".join(map(str, some))) for some in (texts, pair.texts))
                return f"{clip.name} has the caption {found}, not {wanted}"
            here = clip_folders[0] / clip.name
            if not digests and not here.exists():
                return f"{clip.name} is missing"
            if not digests and here.samefile(pair.clip):
                continue
            if (digests[0][0] if digests else file_sha256(here)) != file_sha256(pair.clip):
                return f"{clip.name} is not {pair.clip}"
    except NOT_READ as error:
        return f"it stops: {error}"
    return f"{len(places)} of {len(pairs)} clips are missing, such as {min(places)}" if places else ""


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(100)
