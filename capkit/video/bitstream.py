"""What encoded packets say of themselves: how many frames they show, and whether decoding can start at them."""

from collections.abc import Iterator

SMALL_PACKET = 256  # bytes; those without a slice are smaller, and few with a slice are


def num_shown_frames(codec: str, packet: memoryview, extradata: bytes | None) -> int:
    """How many frames a packet shows: 0 for hidden reference frames of VP8, VP9 and AV1, 1 for codecs without such.

    Also 0 for a small packet of H.264 or H.265 without a slice.

    Sources: RFC 6386, 9.1; VP9 bitstream specification 0.7, 6.2 and annex B; AV1 bitstream specification, 5.3 and 5.9.

    Args:
        codec: FFmpeg's name.
        packet: its bytes, at least one.
        extradata: the stream's headers.
    """
    if codec == "vp8":
        return packet[0] >> 4 & 1
    if codec == "vp9":
        return sum(_vp9_header(frame) & 10 > 0 for frame in _vp9_frames(packet))
    if codec == "av1":
        return sum(
            payload[0] & 0x90 > 0  # show_existing_frame, show_frame
            for kind, payload in _av1_units(packet)
            if kind in (3, 6) and payload
        )
    return int(has_slice(codec, packet, extradata))


def has_slice(codec: str, packet: memoryview, extradata: bytes | None) -> bool:
    """Whether a packet of H.264 or H.265 is large or holds more than headers; True for other codecs.

    Some recorders write headers as packets of their own, and filters leave such packets behind.

    Sources: ITU-T H.264, table 7-1; ITU-T H.265, table 7-1.
    """
    if codec not in ("h264", "hevc") or len(packet) >= SMALL_PACKET:
        return True
    headers = range(32, 41) if codec == "hevc" else range(6, 13)
    kinds = {kind for kind, _ in _units(codec, bytes(packet), extradata)}
    return not kinds or not kinds.issubset(headers)


def is_random_access_point(codec: str, packet: bytes, extradata: bytes | None) -> bool:
    """Whether all later frames can be decoded from this packet on, which is flagged as a keyframe.

    Checked where decoders do not tell, or not rightly; True for other codecs. H.264 needs an IDR picture, or a recovery
    point at this very picture, as files and FFmpeg also take other I pictures for keyframes.

    Sources: ITU-T H.264, 7.4.1.2.4 and D.2.8; ITU-T H.265, table 7-1; and those of `num_shown_frames`.
    """
    if codec == "vp8":
        return not packet[0] & 1
    if codec == "vp9":
        return not _vp9_header(next(_vp9_frames(memoryview(packet)))) & 4
    if codec == "hevc":
        return any(16 <= kind <= 23 for kind, _ in _units(codec, packet, extradata))
    if codec != "h264":
        return True
    return any(kind == 5 for kind, _ in _units(codec, packet, extradata)) or any(
        number == 6 and payload[0] & 0x80  # recovery_frame_cnt, an Exp-Golomb number, is 0 where its first bit is 1
        for number, payload in _messages(codec, packet, extradata)
    )


def is_picture(codec: str, packet: memoryview) -> bool:
    """Whether a packet of MPEG-1 or 2 holds a picture header; decoders skip others silently. True for other codecs.

    Source: ITU-T H.262, table 6-1.
    """
    return codec not in ("mpeg1video", "mpeg2video") or b"\0\0\1\0" in bytes(packet)


def has_display_orientation(codec: str, packet: bytes, extradata: bytes | None) -> bool:
    """Whether a packet of H.264 or H.265 says how to turn its picture and, mostly, those after it.

    Sources: ITU-T H.264, D.2.27; ITU-T H.265, D.3.17.
    """
    return codec in ("h264", "hevc") and any(
        number == 47 and not payload[0] & 0x80  # display_orientation_cancel_flag
        for number, payload in _messages(codec, packet, extradata)
    )


def _vp9_frames(packet: memoryview) -> Iterator[memoryview]:
    """The frames of a superframe, or the packet itself."""
    marker, at = packet[-1], 0
    num_frames, num_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = len(packet) - 2 - num_frames * num_bytes
    if marker >> 5 != 6 or index < 0 or packet[index] != marker:
        yield packet
        return
    for i in range(num_frames):
        size = int.from_bytes(packet[index + 1 + i * num_bytes :][:num_bytes], "little")
        if size:
            yield packet[at : at + size]
        at += size


def _vp9_header(frame: memoryview) -> int:
    """First byte of a frame: show_existing_frame is its bit 8, frame_type (0 for a keyframe) 4, show_frame 2."""
    return frame[0] << 1 if frame[0] >> 4 & 3 == 3 else frame[0]  # profile 3 has one more bit in front


def _av1_units(packet: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and payload of each open bitstream unit."""
    at = 0
    while at < len(packet):
        header, size = packet[at], len(packet)
        at += 2 if header & 4 else 1
        if header & 2:
            size = 0
            for i in range(8):  # LEB128
                if at >= len(packet):
                    return
                size |= (packet[at] & 127) << 7 * i
                at += 1
                if packet[at - 1] < 128:
                    break
        yield header >> 3 & 15, packet[at : at + size]
        at += size


def _units(codec: str, packet: bytes, extradata: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Type and content of each network abstraction layer unit of H.264 or H.265.

    They stand after start codes, or after their lengths as in MP4 and Matroska.
    """
    is_hevc = codec == "hevc"
    for unit in _split(packet, extradata, 21 if is_hevc else 4):
        yield (unit[0] >> 1 & 63, unit[2:]) if is_hevc else (unit[0] & 31, unit[1:])


def _split(packet: bytes, extradata: bytes | None, at_length: int) -> Iterator[bytes]:
    """Units that are not empty; `extradata` tells the width of their lengths at `at_length`."""
    if not extradata or len(extradata) <= at_length or extradata.startswith((b"\0\0\1", b"\0\0\0\1")):
        yield from (unit for unit in packet.split(b"\0\0\1")[1:] if unit)
        return
    num_bytes, at = (extradata[at_length] & 3) + 1, 0
    while at < len(packet):
        size = int.from_bytes(packet[at : at + num_bytes], "big")
        if unit := packet[at + num_bytes : at + num_bytes + size]:
            yield unit
        at += num_bytes + size


def _messages(codec: str, packet: bytes, extradata: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Number and payload, not empty, of each supplemental enhancement information message of H.264 or H.265."""
    for kind, content in _units(codec, packet, extradata):
        if kind == (39 if codec == "hevc" else 6):
            yield from _split_messages(content.replace(b"\0\0\3", b"\0\0"))


def _split_messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data) - 2:
        numbers = []
        for _ in range(2):  # type, then size, each as a sum that ends with a byte below 255
            number = 0
            while at < len(data) and data[at] == 255:
                number, at = number + 255, at + 1
            if at >= len(data):
                return
            numbers.append(number + data[at])
            at += 1
        if payload := data[at : at + numbers[1]]:
            yield numbers[0], payload
        at += numbers[1]
