"""Layouts of data sets to keep or share, with several captions a clip and its picture strip: WebDataset, Parquet."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO

from capkit.export.layouts.base import Layout, Pair
from capkit.export.layouts.tables import VideoFolder, check_split_names

MAX_SHARD_BYTES, MAX_SHARD_CLIPS = 1 << 30, 1000
ROWS_AT_ONCE = 500


class WebDataset(Layout):
    """WebDataset shards `clips-00000.tar` and on, of 1 GiB or 1,000 clips; the clips are copied into them.

    Each clip has `dog.mp4`, `dog.json` with `captions`, `dog.txt` with the first of them and, if the stores have those
    of all clips, `dog.webp`, the frames as the captioner saw them. `load_dataset("webdataset")` takes what is before
    the first "." of a name for the key of a sample, and the first samples must have the same members; so all clips
    must be .mp4. Facts: huggingface/datasets 5.2.0, packaged_modules/webdataset/webdataset.py.
    """

    name = "webdataset"
    trainer = 'load_dataset("webdataset")'
    clip_folder = ""
    clip_suffixes = frozenset((".mp4",))
    holds_several = True
    with_strips = True
    packs_clips = True
    uses_datasets = True
    launch = 'load_dataset("webdataset", data_dir={path!r}, split="train")  # Python, from datasets'

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        with_strips, left = all(pair.strip for pair in pairs), iter(pairs)
        number, pair = 0, next(left, None)
        while pair:
            with tarfile.open(root / _shard(number), "w") as shard:
                for _ in range(MAX_SHARD_CLIPS):
                    _add(shard, pair, with_strips)
                    pair = next(left, None)
                    if not pair or shard.offset > MAX_SHARD_BYTES:
                        break
            number += 1

    def read(self, root: Path) -> Iterator[tuple[Path, str, str]]:
        for path in sorted(root.glob("*.tar")):
            clip, digest, texts = root, "", []
            with tarfile.open(path, "r|") as shard:
                for member in shard:
                    file, suffix = shard.extractfile(member), Path(member.name).suffix
                    if not file:
                        raise ValueError(f"{path.name}: {member.name} is no file")
                    if suffix == ".mp4":
                        clip, digest = root / member.name, _sha256(file)
                    elif suffix == ".json":
                        texts = json.load(file)["captions"]
                    elif suffix == ".txt":
                        if [file.read().decode()] != texts[:1]:
                            raise ValueError(f"{path.name}: {member.name} has another caption than the .json")
                        yield from ((clip, text, digest) for text in texts)

    def caption_files(self, names: Iterable[str]) -> set[str]:
        return {_shard(number) for number, _ in enumerate(names)}


def _add(shard: tarfile.TarFile, pair: Pair, with_strip: bool) -> None:
    """Add the members of a clip."""
    texts = {".json": json.dumps({"captions": pair.texts}), ".txt": pair.text}
    with ExitStack() as opened:
        files: dict[str, BinaryIO] = {pair.name: opened.enter_context(open(pair.clip, "rb"))}
        files |= {pair.stem + suffix: io.BytesIO(text.encode()) for suffix, text in texts.items()}
        if with_strip:
            files[f"{pair.stem}.webp"] = opened.enter_context(open(pair.strip, "rb"))
        for name, file in files.items():
            member = tarfile.TarInfo(name)
            member.size = file.seek(0, os.SEEK_END)
            file.seek(0)
            shard.addfile(member, file)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in iter(lambda: file.read(1 << 20), b""):
        digest.update(piece)
    return digest.hexdigest()


def _shard(number: int) -> str:
    return f"clips-{number:05}.tar"


class VideoFolderParquet(VideoFolder):
    """`metadata.parquet` among the clips: `captions`, the first of them as `caption`, and `strip`: the frames.

    `load_dataset("videofolder")` gives clips, captions and pictures. A clip whose strip its store does not have has
    none. Facts: huggingface/datasets 5.2.0, packaged_modules/folder_based_builder/folder_based_builder.py.
    """

    name = "metadata-parquet"
    tables = ("metadata.parquet",)
    columns = ("caption",)
    holds_several = True
    with_strips = True
    needs_package = "pyarrow"
    unfit = Layout.unfit  # Parquet knows the types

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = {"dtype": "string", "_type": "Value"}
        features = {"file_name": text, "caption": text, "captions": [text], "strip": {"_type": "Image"}}
        picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        types = {"file_name": pa.string(), "caption": pa.string(), "captions": pa.list_(pa.string()), "strip": picture}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        schema = pa.schema(types.items(), metadata=metadata)
        left = iter(pairs)
        with pq.ParquetWriter(root / self.tables[0], schema) as writer:
            while rows := list(islice(left, ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist([_parquet_row(pair) for pair in rows], schema))

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        import pyarrow.parquet as pq

        check_split_names(root)
        with pq.ParquetFile(root / self.tables[0]) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=["file_name", "captions"]):
                for row in batch.to_pylist():
                    yield from ((root / row["file_name"], text) for text in row["captions"])


def _parquet_row(pair: Pair) -> dict[str, object]:
    strip = {"bytes": Path(pair.strip).read_bytes(), "path": f"{pair.stem}.webp"} if pair.strip else None
    return {"file_name": pair.name, "caption": pair.text, "captions": pair.texts, "strip": strip}
