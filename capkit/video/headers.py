"""What headers of MP4, Matroska and AVI files say and PyAV does not: the file's size and the pictures' cropping."""

from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

Cropping = tuple[int, int, int, int]
NONE = (0, 0, 0, 0)
MOST_BYTES = 2**28  # of an index; a size may be wrong
MOST_SEEKABLE = 2**40  # bytes; file systems refuse a place far beyond a file's end
UNKNOWN = 2**56 - 1  # size of an EBML element that ends where the file or the stream does
EBML, SEGMENT, TRACKS, TRACK, TRACK_TYPE, VIDEO = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0xE0
PIXEL_CROPS = (0x54BB, 0x54AA, 0x54CC, 0x54DD)  # top, bottom, left, right


def declared_size(path: str) -> int:
    """The file's size in bytes by its headers (MP4: up to the end of its index, at least); 0 if they do not tell."""
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(0)
        if head[:4] == b"RIFF":  # AVI
            length = int.from_bytes(head[4:], "little")
            return 0 if length == 2**32 - 1 else 8 + length
        if head[:4] == EBML.to_bytes(4, "big"):  # Matroska: everything is in one segment
            return next((end for kind, _, end in _elements_of(file) if kind == SEGMENT and end < MOST_SEEKABLE), 0)
        if head[4:] == b"ftyp":  # MP4. With part of an index FFmpeg would read only the streams in that part
            return next((file.tell() + size for kind, size in _boxes_of(file) if kind == b"moov"), 0)
    return 0


def mp4_cropping(path: str, track_id: int) -> Cropping:
    """Pixels that the "clean aperture" of a track cuts away at the top, bottom, left and right.

    Sources: ISO/IEC 14496-12, 8.3.2 and 12.1.4; as FFmpeg, which ignores one that is larger than the picture.
    """
    with open(path, "rb") as file:
        index = next((file.read(min(size, MOST_BYTES)) for kind, size in _boxes_of(file) if kind == b"moov"), b"")
    if b"clap" not in index:
        return NONE
    for track in _find(index, b"trak"):
        header = next(_find(track, b"tkhd"), b"")
        at = 20 if header[:1] == b"\1" else 12
        if int.from_bytes(header[at : at + 4], "big") != track_id:
            continue
        for table in _find(track, b"mdia", b"minf", b"stbl", b"stsd"):
            for _, entry in _boxes(table[8:]):
                for aperture in _find(entry[78:], b"clap"):
                    size = [int.from_bytes(entry[at : at + 2], "big") for at in (24, 26)]
                    return _clean_aperture(aperture, *size)
    return NONE


def _clean_aperture(box: bytes, width: int, height: int) -> Cropping:
    numbers = [int.from_bytes(box[at : at + 4], "big", signed=at in (16, 24)) for at in range(0, 32, 4)]
    if len(box) < 32 or 0 in numbers[1::2]:
        return NONE
    wide, high, right_of_centre, below_centre = (Fraction(*numbers[i : i + 2]) for i in range(0, 8, 2))
    left, top = int((width - wide) / 2 + right_of_centre), int((height - high) / 2 + below_centre)
    cropping = (top, height - top - int(high), left, width - left - int(wide))
    return cropping if min(cropping) >= 0 and wide >= 1 and high >= 1 else NONE


def _boxes_of(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and size of the content of each box of a file, which is positioned at the content."""
    at = 0
    while len(head := file.read(8)) == 8:
        size, length = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, length = int.from_bytes(file.read(8), "big"), 16
        if not length <= size < MOST_SEEKABLE:
            return
        yield head[4:], size - length
        at += size
        file.seek(at)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each box in a box."""
    at = 0
    while (size := int.from_bytes(data[at : at + 4], "big")) >= 8:
        yield data[at + 4 : at + 8], data[at + 8 : at + size]
        at += size


def _find(data: bytes, *kinds: bytes) -> Iterator[bytes]:
    """Contents of the boxes at a path of kinds."""
    for kind, content in _boxes(data):
        if kind == kinds[0]:
            yield from _find(content, *kinds[1:]) if kinds[1:] else (content,)


def matroska_cropping(path: str, number: int) -> Cropping:
    """Pixels that a video track, the one with this number from 0 on, cuts away at the top, bottom, left and right.

    Source: RFC 9559, 5.1.4.1.28.
    """
    with open(path, "rb") as file:
        start, end = next(((start, end) for kind, start, end in _elements_of(file) if kind == TRACKS), (0, 0))
        file.seek(start)
        tracks = file.read(min(end - start, MOST_BYTES))
    videos = [dict(_elements(track)) for kind, track in _elements(tracks) if kind == TRACK]
    videos = [track for track in videos if track.get(TRACK_TYPE, b"")[-1:] == b"\1"]
    if number >= len(videos):
        return NONE
    settings = dict(_elements(videos[number].get(VIDEO, b"")))
    top, bottom, left, right = (int.from_bytes(settings.get(crop, b""), "big") for crop in PIXEL_CROPS)
    return top, bottom, left, right


def _elements_of(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of the content of each element of a file and of its segment."""
    at = 0
    while True:
        file.seek(at)
        kind, size, length = _element(file.read(12))
        if not length:
            return
        at += length
        yield kind, at, at + size
        if kind != SEGMENT:
            if size >= MOST_SEEKABLE:
                return
            at += size


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each EBML element."""
    at = 0
    while at < len(data):
        kind, size, length = _element(data[at : at + 12])
        if not length:
            return
        yield kind, data[at + length : at + length + size]
        at += length + size


def _element(head: bytes) -> tuple[int, int, int]:
    """Number, size of the content (or UNKNOWN) and length of the header of an element; zeros where none begins."""
    width = 9 - head[0].bit_length() if head else 9
    if width > 4 or len(head) <= width or not head[width]:
        return 0, 0, 0
    length = 9 - head[width].bit_length()
    most = (1 << 7 * length) - 1
    size = int.from_bytes(head[width : width + length], "big") & most
    return int.from_bytes(head[:width], "big"), UNKNOWN if size == most else size, width + length
