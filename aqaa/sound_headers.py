"""How long a sound file is: the length that its header states against the bytes that are there.

libsndfile believes a header and stays silent when sound is missing. So a length that a killed or
streaming writer never filled in is filled in here, and one that promises more than there is means
that the file is cut off. Everything works on the bytes of the whole file and decodes nothing."""

import struct
from itertools import islice
from typing import NamedTuple

FEW = 128  # bytes by which a size may be too large: writers count the header in, or a padding byte
OPEN_SIZE = 0x7FF00000  # 32-bit sizes from here on mean "until the end"


class AudioError(ValueError):
    """A sound that cannot be used; its one sentence names the sound, the fault and the remedy."""


def refusal(name, fact, remedy):
    return AudioError(f"{name} {fact}: {remedy}.")


def too_long(name, seconds, limit, at_least=False):
    lasts = f"lasts {'more than ' if at_least else ''}{seconds:.0f} s"
    return refusal(name, f"{lasts}, the limit is {limit:g} s", "cut it into shorter questions")


def cut_off(name, details):
    return refusal(name, f"is cut off{details}", "get the whole file")


# ---- sizes that a header states ------------------------------------------------------------------


class Size(NamedTuple):
    """Where a header states how many bytes of samples follow."""

    code: str  # of struct
    place: int
    besides: int  # bytes that it counts besides the samples
    start: int  # of the samples
    stated: int  # bytes of samples, negative or huge when the writer did not know


CHUNKED = (
    # magic, place of the form, its names, first chunk, its header, counted besides, alignment, name
    *((magic, 8, (b"WAVE",), 12, "<4sI", 0, 2, b"data") for magic in (b"RIFF", b"RF64", b"BW64")),
    (b"RIFX", 8, (b"WAVE",), 12, ">4sI", 0, 2, b"data"),
    (b"FORM", 8, (b"AIFF", b"AIFC"), 12, ">4sI", 0, 2, b"SSND"),
    (b"FORM", 8, (b"8SVX", b"16SV"), 12, ">4sI", 0, 2, b"BODY"),
    (b"riff\x2e\x91\xcf\x11", 24, (b"wave",), 40, "<16sQ", 24, 8, b"data"),  # W64
    (b"caff", 0, (b"caff",), 8, ">4sq", 0, 1, b"data"),
)


def _chunks(data, place, code, besides, alignment):
    """(name, start of the content, its length) of each chunk."""
    header = struct.calcsize(code)
    while place + header <= len(data):
        name, length = struct.unpack_from(code, data, place)
        yield name[:4], place + header, length - besides
        place += header + max(0, length - besides)
        place += -place % alignment


def _size(data):
    """The Size of a file that states one, else None."""
    if data[:4] in (b".snd", b"dns.") and len(data) >= 12:
        order = ">" if data[:4] == b".snd" else "<"
        start, stated = struct.unpack_from(order + "II", data, 4)
        return Size(order + "I", 8, 0, start, stated)
    for magic, at, forms, first, code, besides, alignment, samples in CHUNKED:
        if not (data.startswith(magic) and data[at : at + 4] in forms):
            continue
        long = None  # where RF64 keeps the 64-bit size
        chunks = _chunks(data, first, code, besides, alignment)
        for name, start, length in islice(chunks, 10_000):
            if name == b"ds64" and len(data) >= start + 16:
                long = start + 8
            if name == samples and long and length == 0xFFFFFFFF:
                return Size("<Q", long, 0, start, struct.unpack_from("<Q", data, long)[0])
            if name == samples:
                width = struct.calcsize(code) - (16 if code == "<16sQ" else 4)
                return Size(code[0] + code[-1], start - width, besides, start, length)
    return None


def _ends_in_chunks(data, start):
    """Whether all that follows are chunks with names: then a size of 0 is meant."""
    return all(
        all(32 <= character < 127 for character in name) and content + length <= len(data) + 1
        for name, content, length in islice(_chunks(data, start, "<4sI", 0, 2), 100)
    )


def completed(data, name, max_seconds):
    """The file, its sizes put right where the writer left them open: sound goes on to the end.
    Raises AudioError if more than FEW bytes are missing: fewer are a slip of the writer."""
    if data[:4] == b"OggS":
        _check_last_page(data, name)
    elif data[:3] in (b"ID3", b"TAG") or _mp3_header(data, 0):
        return _completed_mp3(data, name, max_seconds)
    size = _size(data)
    if size is None:
        return data
    present = len(data) - size.start
    missing = size.stated - present
    # No promise, since the writer did not know it: none, or one of the largest.
    left_open = size.stated <= 0 or OPEN_SIZE <= size.stated <= 0xFFFFFFFF or size.stated >= 1 << 62
    if not left_open and missing > FEW:
        raise cut_off(name, f", {missing} bytes are missing")
    if present <= 0 or not (left_open or missing > 0):
        return data
    if size.stated == 0 and _ends_in_chunks(data, size.start):
        return data
    patched = bytearray(data)
    struct.pack_into(size.code, patched, size.place, present + size.besides)
    return bytes(patched)


def _check_last_page(data, name):
    """An Ogg file is whole when its last page is whole and says that it ends the stream."""
    page = data.rfind(b"OggS")
    body = page + 27 + data[page + 26] if len(data) > page + 26 else len(data) + 1
    whole = body <= len(data) and body + sum(data[page + 27 : body]) <= len(data)
    if not whole or not data[page + 5] & 4:
        raise cut_off(name, ", its last page is missing")


# ---- mp3 -----------------------------------------------------------------------------------------

KBITS = {  # of layer III by version: 3 is MPEG-1, 2 MPEG-2, 0 MPEG-2.5
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
KBITS[0] = KBITS[2]


class Frame(NamedTuple):
    place: int
    size: int  # bytes
    samples: int
    rate: int  # Hz
    promised: int | None = None  # frames that follow it, if it is a tag that counts them


def _mp3_header(data, place):
    """The Frame whose header stands at `place`, or None."""
    if place + 4 > len(data) or data[place] != 0xFF or data[place + 1] & 0xE6 != 0xE2:
        return None
    version = data[place + 1] >> 3 & 3
    kbits, rate = data[place + 2] >> 4, data[place + 2] >> 2 & 3
    if version == 1 or kbits in (0, 15) or rate == 3:
        return None
    rate = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 1152 if version == 3 else 576
    size = samples // 8 * 1000 * KBITS[version][kbits] // rate + (data[place + 2] >> 1 & 1)
    return Frame(place, size, samples, rate)


def _side_bytes(data, place):
    """Bytes between a frame's header and where Xing's tag stands."""
    stereo = data[place + 3] >> 6 != 3
    return (32 if stereo else 17) if data[place + 1] >> 3 & 3 == 3 else (17 if stereo else 9)


def _promised(data, place):
    """Frames that a tag at the head of an mp3 (Xing, Info, VBRI) counts: 0 if it does not say."""
    tag = place + 4 + _side_bytes(data, place)
    if data[tag : tag + 4] in (b"Xing", b"Info") and len(data) >= tag + 12:
        flags, count = struct.unpack_from(">II", data, tag + 4)
        return count if flags & 1 else 0
    if data[place + 36 : place + 40] == b"VBRI" and len(data) >= place + 54:
        return struct.unpack_from(">I", data, place + 50)[0]
    return None


def _mp3_frames(data):
    """Frames in turn, without the tags and other bytes between them; the last one may be cut."""
    place, lost, sure = 0, 0, True
    while place + 4 <= len(data) and lost < 1 << 16:
        frame = _mp3_header(data, place)
        if frame and (sure or _mp3_header(data, place + frame.size)):
            yield frame._replace(promised=_promised(data, place))
            place, sure = place + frame.size, True
        elif data.startswith(b"ID3", place) and place + 10 <= len(data):
            size = data[place + 6 : place + 10]
            place += 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(size))
        elif data.startswith(b"TAG", place):
            place += 128
        elif data.startswith(b"APETAGEX", place) and place + 16 <= len(data):
            place += 32 + struct.unpack_from("<I", data, place + 12)[0]
        elif data.startswith((b"fLaC", b"OggS", b"RIFF"), place):
            return  # a tag before something else
        else:
            lost, sure = lost + 1, False
            place = data.find(b"\xff", place + 1)
            if place < 0:
                return


def _completed_mp3(data, name, max_seconds):
    """An mp3 with one tag that counts all its frames: without, libsndfile guesses the length. A tag
    that counts too few (two files joined) is replaced; one that counts too many: cut off."""
    frames, seconds = [], 0.0
    for frame in _mp3_frames(data):
        frames.append(frame)
        seconds += frame.samples / frame.rate
        if max_seconds and seconds > max_seconds + 1:
            raise too_long(name, seconds, max_seconds, at_least=True)
    if not frames:
        return data
    tags = [i for i, frame in enumerate(frames) if frame.promised is not None]
    cut = frames[-1].place + frames[-1].size > len(data)
    whole = len(frames) - cut
    for tag, following in zip(tags, [*tags[1:], whole]):
        count, promised = following - tag - 1, frames[tag].promised
        spare = 0 if cut and following == whole else 1  # some encoders count the tag's own frame
        if promised - count > spare:
            raise cut_off(name, f" after {count} of {promised} frames")
    if tags == [0] and frames[0].promised >= whole - 1:
        return data
    kept = [frame for frame in frames[:whole] if frame.promised is None]
    if not kept or len({frame.rate for frame in kept}) > 1:
        return data
    first = kept[0].place
    header = bytes((0xFF, data[first + 1] | 1, 0x80 | data[first + 2] & 0x0C, data[first + 3]))
    tag = header + bytes(_side_bytes(data, first)) + struct.pack(">4sII", b"Info", 1, len(kept))
    tag = tag.ljust(_mp3_header(header, 0).size, b"\0")
    return tag + b"".join(data[frame.place : frame.place + frame.size] for frame in kept)


def check_boxes(data, name):
    """The boxes of an mp4 follow one another; one that reaches beyond the end has been cut."""
    place = 0
    while place + 16 <= len(data):
        size = struct.unpack_from(">I", data, place)[0] or len(data) - place
        if size == 1:
            size = struct.unpack_from(">Q", data, place + 8)[0]
        if size < 8:
            return
        place += size
    if place > len(data):
        raise cut_off(name, f", {place - len(data)} bytes are missing")
