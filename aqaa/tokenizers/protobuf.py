"""The wire format of protobuf, as far as two published files need it: an ONNX network and a
SentencePiece model. Their libraries would be dependencies of a run-time that reads each once."""


def fields(data):
    """(field number, value) of a message: int for a varint, a slice of `data` for anything else.

    Raises ValueError, or IndexError where the message ends within a number.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind not in (0, 1, 2, 5):
            raise ValueError(f"it has a field of kind {kind}")
        if kind == 0:
            value, place = _varint(data, place)
        else:
            size, place = _varint(data, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
            value = data[place : place + size]
            place += size
            if len(value) < size:
                raise ValueError("it is cut off")
        yield key >> 3, value


def integers(data):
    """The varints of a packed field."""
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data, place):
    """(value, place behind it)."""
    value = 0
    for shift in range(0, 70, 7):  # ten bytes hold 64 bits; longer ones take quadratic time
        byte = data[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
    raise ValueError("a number is too long")
