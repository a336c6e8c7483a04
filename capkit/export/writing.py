"""An export's folder: what may be there before, writing it whole or not at all, reading it back."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from capkit.export.base import Layout, Pair, shorten
from capkit.files import file_sha256


class ExportError(RuntimeError):
    """An export that could not be written, or did not come back as it was written; nothing of it is left."""


def is_there(kind: Layout, root: Path, pairs: list[Pair], overwrite: bool) -> bool:
    """True where the root holds this very export already; False where it may be written.

    Raises:
        ValueError: the root holds something else.
    """
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return False
    if not root.is_dir():
        raise ValueError(f"output_dir: {root} is a file")
    for name in kind.latents:
        if (root / name).is_dir():
            raise ValueError(
                f"output_dir: {root} holds {name}/, what a trainer has made of clips, by their names; it would use it "
                "for the new clips too. Delete it, or choose another folder"
            )
    try:
        found = kind.read(root)
    except (ValueError, KeyError, IndexError, OSError):
        found = []
    names = [clip.name for clip, _ in found]
    own = kind.caption_files(names) | {(Path(kind.clip_folder) / name).as_posix() for name in names}
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}
    if foreign := sorted(files - own):
        raise ValueError(f"output_dir: {root} holds {foreign[0]!r}, which is no part of such an export; choose another")
    if not _differences(kind, root, pairs):
        return True
    if not overwrite:
        raise ValueError(f"output_dir: {root} holds other captions; choose another folder, or overwrite=True")
    return False


def write_export(kind: Layout, root: Path, pairs: list[Pair], clips: str) -> None:
    """Write an export beside its place, read it back, and only then give it its name.

    A process killed on the way leaves a hidden folder `.<name>.part-...` that nothing takes for an export.

    Args:
        root: must be free, or may be replaced, as `is_there` says.
        clips: "link", "copy" or "hardlink".

    Raises:
        ExportError: it could not be written, or reads otherwise than it should.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{root.name}.part-", dir=root.parent))
    except OSError as error:
        raise ExportError(f"{root.parent}: cannot be written to: {error}") from error
    try:
        part.chmod(0o755)
        place = {"link": os.symlink, "copy": shutil.copyfile, "hardlink": os.link}[clips]
        (part / kind.clip_folder).mkdir(parents=True, exist_ok=True)
        for pair in pairs:
            place(pair.clip, part / kind.clip_folder / pair.name)
        kind.write(part, pairs)
        if differences := _differences(kind, part, pairs):
            raise ExportError(f"{root}: read back as {kind.trainer} reads it, {differences[0]}; nothing is left of it")
        _move(part, root)
    except OSError as error:
        hint = "; a copy (clips='copy') needs no links" if clips != "copy" else ""
        raise ExportError(f"{root}: could not be written: {error}{hint}; nothing is left of it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(part: Path, root: Path) -> None:
    """Give the whole folder its name; an older one is away only for the moment between two renames."""
    if root.exists() and not any(root.iterdir()):
        root.rmdir()
    if not root.exists():
        part.rename(root)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{root.name}.old-", dir=root.parent))
    root.rename(old / root.name)
    part.rename(root)
    shutil.rmtree(old)


def _differences(kind: Layout, root: Path, pairs: list[Pair]) -> list[str]:
    """What is not as it should be when the root is read as the trainer reads it, in words."""
    try:
        found = kind.read(root)
    except (ValueError, KeyError, IndexError, OSError) as error:
        return [f"it stops: {error}"]
    wanted = {root / kind.clip_folder / pair.name: pair for pair in pairs}
    told = [] if len(found) == len(pairs) else [f"there are {len(found)} pairs, not {len(pairs)}"]
    for clip, text in found:
        pair = wanted.pop(clip, None)
        if pair is None:
            told.append(f"{clip.name} is not expected, or twice")
        elif text != pair.text:
            told.append(f"{clip.name} has the caption {shorten(str(text))}, not {shorten(pair.text)}")
        elif not (clip.exists() and (clip.samefile(pair.clip) or file_sha256(clip) == file_sha256(pair.clip))):
            told.append(f"{clip.name} is not {pair.clip}")
    return told + [f"{clip.name} is missing" for clip in wanted]
