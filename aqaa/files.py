"""Files on disk, written whole or not at all, and one sentence for each fault. Needs no torch."""

import errno
import hashlib
import json
import os
import pickle
import platform
import re
import secrets
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

AGAIN = "get the whole folder again"
TRAIN = f"{AGAIN}, or train it with `aqaa train`"

LFS_POINTER = b"version https://git-lfs"
JSON_BYTES = 64_000_000  # of the longest JSON file that is read: an index of a million tensors
MB = 1_000_000
MEMORY = "/dev/shm"  # files here never reach a disk
SPARE = 256 * MB  # a container may have far less of it
NEW_FILE = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | os.O_WRONLY  # through no link
LEFT = re.compile(r"(?:^aqaa-|\.)([0-9a-f]{8})-(\d+)(?:-\w+|\.[0-9a-f]{8}\.part)$")  # process_tag()
DAMAGE = (  # what the readers of json, npz, pickle and safetensors raise for a damaged file
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError,
    pickle.PickleError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class ModelError(ValueError):
    """Weights that cannot be used; its one sentence names the file, the fault and the remedy."""


class WriteError(OSError):
    """A file that cannot be written; its one sentence names the file, the reason, the remedy."""

    def __init__(self, path, reason, number=None):
        super().__init__(number, reason)
        remedy = "free some room there, or choose another folder"
        self.sentence = f"{path} cannot be written ({reason}): {remedy}."

    def __str__(self):
        return self.sentence


def brief(fault):
    """The first line of an exception's message, without a closing full stop."""
    return (str(fault).splitlines() or [type(fault).__name__])[0].strip(" .")


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def replacing(path, parents=True, mode=0o666, keep=None):
    """A path to write to, in the same folder; it takes the name `path` if all goes well.

    If not, it goes away. The part is a new file with the rights of any new file, never one that
    somebody laid there, and it is on the disk before it takes the name. A process that is killed
    leaves it behind, for `sweep`. If `path` is a link, the file that it leads to is replaced; a
    device or a pipe is written in place. parents: make the folder. mode: the rights, less the
    umask. keep: the name that the earlier file takes, for `restore`. Raises WriteError."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    part = path.with_name(f".{path.name[:40]}.{process_tag()}.{secrets.token_hex(4)}.part")
    keep = keep if path.exists() else None
    if keep:  # the room of the one before is needed: there are never more than two
        with writing(keep):
            Path(keep).unlink(missing_ok=True)
    try:
        with writing(path):
            if parents:
                path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(part, NEW_FILE, mode))
            rights = part.stat().st_mode
            yield part
            _sync(part, os.O_RDWR)
            if part.stat().st_mode != rights:  # some libraries put a file of their own there
                part.chmod(stat.S_IMODE(rights))
            if keep:
                os.replace(path, keep)
            os.replace(part, path)
            with suppress(OSError):  # not every file system syncs a folder
                _sync(path.parent, os.O_RDONLY)
    finally:
        with suppress(OSError):
            part.unlink()


def restore(path, kept):
    """Give the name `path` back to the earlier file that `replacing` kept. Raises WriteError."""
    with writing(path):
        os.replace(kept, path)


def _sync(path, flags):
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path):
    """A fault of the disk or of a file beside `path` becomes a WriteError; other faults pass."""
    folder = Path(os.path.abspath(path)).parent
    try:
        yield
    except WriteError:
        raise
    except OSError as fault:
        names = [name for name in (fault.filename, fault.filename2) if isinstance(name, str)]
        places = [Path(os.path.abspath(name)) for name in names]
        if names and not any(folder == p.parent or folder.is_relative_to(p) for p in places):
            raise  # of a file that was read
        raise WriteError(path, fault.strerror or brief(fault), fault.errno) from None
    except Exception:  # torch and safetensors have faults of their own for a full disk
        if not folder.is_dir() or shutil.disk_usage(folder).free > MB:
            raise
        raise WriteError(path, os.strerror(errno.ENOSPC), errno.ENOSPC) from None


def write_json(path, content):
    """Write a JSON file, whole or not at all. Raises WriteError."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def probe(folder, need=0):
    """Raise WriteError unless `folder` can be made, takes files, and has `need` bytes free."""
    folder = Path(folder)
    with writing(folder / "probe"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    if free < need:
        reason = f"{free // MB} MB are free, {-(-need // MB)} MB are needed"
        raise WriteError(folder, reason, errno.ENOSPC)


# ---- what dead processes leave ------------------------------------------------------------------


def process_tag():
    """This machine and process, as part of a name: "1c0ffee5-4711"."""
    return f"{zlib.crc32(platform.node().encode()):08x}-{os.getpid()}"


@contextmanager
def scratch():
    """A folder for temporary files, in memory where there is room; removed at the end."""
    usable = os.path.isdir(MEMORY) and os.access(MEMORY, os.W_OK)
    place = MEMORY if usable and shutil.disk_usage(MEMORY).free > SPARE else None
    with tempfile.TemporaryDirectory(prefix=f"aqaa-{process_tag()}-", dir=place) as folder:
        yield Path(folder)


def sweep(*folders):
    """Remove unfinished files and scratch folders of processes of ours that have died."""
    for folder in map(Path, folders):
        for path in folder.iterdir() if folder.is_dir() else ():
            match = LEFT.search(path.name)
            if not match or match[1] != process_tag()[:8] or _alive(int(match[2])):
                continue
            with suppress(OSError):
                if path.lstat().st_uid != os.getuid():
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def sweep_scratch():
    """`sweep` where `scratch` makes its folders."""
    sweep(MEMORY, tempfile.gettempdir())


def _alive(pid):
    if os.name != "posix":
        return True  # there is no harmless way to ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process of another user
        pass
    return True


# ---- reading ------------------------------------------------------------------------------------


@contextmanager
def refusing(sentence, remedy, *kinds):
    """Within it exceptions of these kinds become a ModelError: `sentence (reason): remedy.`"""
    try:
        yield
    except ModelError:
        raise
    except kinds as fault:
        reason = getattr(fault, "strerror", None) or brief(fault)
        raise ModelError(f"{sentence} ({reason}): {remedy}.") from None


@contextmanager
def passing_on(remedy=""):
    """Within it the sentence of a ValueError becomes that of a ModelError, with a remedy if any."""
    try:
        yield
    except ModelError:
        raise
    except ValueError as fault:
        raise ModelError(f"{brief(fault)}; {remedy}." if remedy else fault) from None


def reading(path, remedy):
    """Within it DAMAGE that a reader raises becomes a ModelError about `path`."""
    return refusing(f"{path} is cut short or damaged", remedy, *DAMAGE)


def parse_json(text, nan=False):
    """The value of a JSON text. Raises ValueError; for NaN and infinities too unless `nan`."""
    try:
        return json.loads(text, parse_constant=float if nan else _refuse)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def _refuse(name):
    raise ValueError(f"{name} is no number of JSON")


def read_json(path, nan=False):
    """The value of a JSON file. Raises ValueError, or OSError."""
    if (size := Path(path).stat().st_size) > JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes, at most {JSON_BYTES:,} are expected")
    return parse_json(Path(path).read_text(encoding="utf-8"), nan)


def read_object(path, remedy, nan=True):
    """The object of a JSON file; records of ours may hold NaN. Raises ModelError."""
    with reading(path, remedy):
        content = read_json(path, nan)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not names and values")
        return content


def fingerprint(path):
    """{"bytes", "sha256"} of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.path.getsize(path), "sha256": digest}


def check_file(path, remedy=TRAIN):
    """Raise ModelError unless there is a file, and not a Git LFS pointer, at path."""
    if not path.is_file():
        raise ModelError(f"{path} is missing: {remedy}.")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            kind = "a Git LFS pointer, not the file itself"
            raise ModelError(f"{path} is {kind}: run `git lfs pull`.")


# ---- names and places ---------------------------------------------------------------------------


def data_folder():
    """The folder of `mini/` and `questions/`: $AQAA_DATA, the clone's `data`, or pip's place."""
    if named := os.environ.get("AQAA_DATA"):
        return Path(named)
    clone = Path(__file__).resolve().parents[1] / "data"
    return clone if clone.is_dir() else Path(sys.prefix) / "share" / "aqaa"


def named(names):
    """"a", or "a and 3 more"."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def server_address(url, other=""):
    """urlsplit of a server's address, by default http. Raises ValueError, ending in `other`."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        example = f"http://127.0.0.1:8000{other}"
        raise ValueError(f"{url!r} is no address of a server: write it as {example}.")
    return parts
