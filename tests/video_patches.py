"""Rename, drop or rewrite parts of a video container, in place in a bytearray; ValueError where a part is missing."""

import struct


def rename(kind, new="free"):
    """Rename every MP4 box of a kind within the index, so that readers skip it."""

    def change(data):
        at = data.rindex(b"moov")
        at = data.index(kind.encode(), at)
        while at > 0:
            data[at : at + 4] = new.encode()
            at = data.find(kind.encode(), at)

    return change


def put(kind, offset, layout, *values):
    """Write `values` at an offset from the start of the MP4 box's content."""
    return lambda data: struct.pack_into(
        f">{layout}", data, data.index(kind.encode(), data.rindex(b"moov")) + 4 + offset, *values
    )


def matrix(a, b, c, d):
    return put(
        "tkhd",
        40,
        "iiiiiiiii",
        *(int(value * 65536) for value in (a, b)),
        0,
        *(int(value * 65536) for value in (c, d)),
        0,
        0,
        0,
        1 << 30,
    )


def ctts(change):
    """Rewrite the offsets of the MP4 box ctts by change(index, offset)."""

    def rewrite(data):
        at = data.index(b"ctts", data.rindex(b"moov")) + 8
        for i in range(struct.unpack_from(">I", data, at)[0]):
            offset = struct.unpack_from(">i", data, at + 8 + 8 * i)[0]
            struct.pack_into(">i", data, at + 8 + 8 * i, change(i, offset))

    return rewrite


def _vint(data, at):
    length = 9 - data[at].bit_length()
    return length, int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)


def void(element):
    """Turn the first Matroska element with this ID into a Void of the same size."""

    def change(data):
        at, width = data.index(bytes.fromhex(element)), len(element) // 2
        length, size = _vint(data, at + width)
        length += width - 1
        data[at : at + 1 + length] = b"\xec" + (size | 1 << 7 * length).to_bytes(length, "big")

    return change


def ebml(element, value):
    """Rewrite the number in the first Matroska element with this ID."""

    def change(data):
        at = data.index(bytes.fromhex(element)) + len(element) // 2
        length, size = _vint(data, at)
        data[at + length : at + length + size] = value.to_bytes(size, "big")

    return change


def blocks(change):
    """Rewrite the Matroska SimpleBlocks: change(index, time, flags) -> (time, flags)."""

    def rewrite(data):
        index, at = 0, data.index(bytes.fromhex("1F43B675"))
        while at + 12 < len(data):
            width = 9 - data[at].bit_length()
            kind = data[at : at + width].hex().upper()
            length, size = _vint(data, at + width)
            content = at + width + length
            if kind == "A3":
                time, flags = change(index, *struct.unpack_from(">hB", data, content + 1))
                struct.pack_into(">hB", data, content + 1, time, flags)
                index += 1
            at = content if kind == "1F43B675" else content + size

    return rewrite


def ts_packets(change):
    """Rewrite the packets of a transport stream: change(index, packet), 188 bytes, to empty where it is dropped."""

    def rewrite(data):
        packets = [data[at : at + 188] for at in range(0, len(data), 188)]
        for index, packet in enumerate(packets):
            change(index, packet)
        data[:] = b"".join(packets)

    return rewrite


def ts_flag(bit, on):
    """Set or clear a bit in the adaptation fields of a transport stream."""

    def change(index, packet):
        if packet[3] & 0x20 and packet[4]:
            packet[5] = packet[5] | bit if on else packet[5] & ~bit

    return ts_packets(change)


def avi_index(change):
    """Rewrite the flags in an AVI's idx1."""

    def rewrite(data):
        at = data.rindex(b"idx1")
        for i in range(struct.unpack_from("<I", data, at + 4)[0] // 16):
            flags = struct.unpack_from("<I", data, at + 12 + 16 * i)[0]
            struct.pack_into("<I", data, at + 12 + 16 * i, change(i, flags))

    return rewrite


def flv_tags(change):
    """Rewrite an FLV's video tags: change(index, time, first byte) -> (time, first byte)."""

    def rewrite(data):
        at, index = 13, 0
        while at + 11 < len(data):
            size = int.from_bytes(data[at + 1 : at + 4], "big")
            if data[at] == 9:
                time, data[at + 11] = change(index, int.from_bytes(data[at + 4 : at + 7], "big"), data[at + 11])
                data[at + 4 : at + 7] = max(0, time).to_bytes(3, "big")
                index += 1
            at += size + 15

    return rewrite


def swap(old, new):
    """Replace bytes everywhere."""

    def change(data):
        if old not in data:
            raise ValueError(f"no {old!r}")
        data[:] = data.replace(old, new)

    return change
