"""Files on disk: written whole or not at all, and one sentence for whatever is wrong with them. Needs no torch."""

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

AGAIN = "get the whole folder again"

LFS_POINTER = b"version https://git-lfs"
TRAIN = f"{AGAIN}, or train it with `aqaa train`"

MB = 1_000_000
MEMORY = "/dev/shm"  # files here never reach a disk
SPARE = 256 * MB  # a container may have far less of it
ALONE = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | os.O_WRONLY  # a new file, through nobody's link
LEFT = re.compile(r"(?:^aqaa-|\.)([0-9a-f]{8})-(\d+)(?:-\w+|\.[0-9a-f]{8}\.part)$")  # a name that `process_tag` is in


class ModelError(ValueError):
    """Weights that cannot be used; its one sentence names the file, the fault and the remedy."""


class WriteError(OSError):
    """A file that cannot be written; its one sentence names the file, the reason and the remedy."""

    def __init__(self, path, reason, number=None):
        super().__init__(number, reason)
        self.sentence = f"{path} cannot be written ({reason}): free some room there, or choose another folder."

    def __str__(self):
        return self.sentence


def brief(fault):
    """The first line of an exception's message, without a closing full stop."""
    return (str(fault).splitlines() or [type(fault).__name__])[0].strip(" .")


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path, parents=True, mode=0o666):
    """A path to write to, in the same folder, that takes the name `path` if all goes well, and goes away if not.

    This part is a new file with the rights of any new file, never one that somebody laid there, and it is on the disk
    before it takes the name. A process that is killed leaves it behind, for `sweep`. If `path` is a link, the file that
    it leads to is replaced; a device or a pipe is written in place. parents: make the folder. mode: the rights, less
    the umask. Raises WriteError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    part = path.with_name(f".{path.name[:40]}.{process_tag()}.{secrets.token_hex(4)}.part")
    try:
        with writing(path):
            if parents:
                path.parent.mkdir(parents=True, exist_ok=True)
            rights = _create(part, mode)
            yield part
            _sync(part, os.O_RDWR)
            if stat.S_IMODE(part.stat().st_mode) != rights:  # some libraries put a file of their own there
                part.chmod(rights)
            os.replace(part, path)
            with suppress(OSError):  # not every file system syncs a folder
                _sync(path.parent, os.O_RDONLY)
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def writing(path):
    """Within it a fault of the disk, or of a file beside `path`, becomes a WriteError; other faults pass."""
    folder = Path(os.path.abspath(path)).parent
    try:
        yield
    except WriteError:
        raise
    except OSError as fault:
        names = [Path(os.path.abspath(name)) for name in (fault.filename, fault.filename2) if isinstance(name, str)]
        if names and not any(folder == name.parent or folder.is_relative_to(name) for name in names):
            raise  # of a file that was read
        raise WriteError(path, fault.strerror or brief(fault), fault.errno) from None
    except Exception:  # torch and safetensors have faults of their own for a full disk
        if not folder.is_dir() or shutil.disk_usage(folder).free > MB:
            raise
        raise WriteError(path, os.strerror(errno.ENOSPC), errno.ENOSPC) from None


def _create(path, mode):
    """Make an empty file where nothing is; returns its rights."""
    handle = os.open(path, ALONE, mode)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _sync(path, how):
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, content):
    """Write a JSON file, whole or not at all. Raises WriteError."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def probe(folder, need=0):
    """Can files be written into `folder` (made if need be), and are `need` bytes free there? Raises WriteError."""
    folder = Path(folder)
    with writing(folder / "probe"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    if free < need:
        raise WriteError(folder, f"{free // MB} MB are free, {-(-need // MB)} MB are needed", errno.ENOSPC)


# ---- what dead processes leave --------------------------------------------------------------------------------------


def process_tag():
    """This machine and process, as part of a name: "1c0ffee5-4711"."""
    return f"{zlib.crc32(platform.node().encode()):08x}-{os.getpid()}"


@contextmanager
def scratch():
    """A folder for files of a moment, in memory where there is room; it goes away at the end (see `sweep`)."""
    roomy = os.path.isdir(MEMORY) and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > SPARE
    with tempfile.TemporaryDirectory(prefix=f"aqaa-{process_tag()}-", dir=MEMORY if roomy else None) as folder:
        yield Path(folder)


def sweep(*folders):
    """Remove unfinished files and scratch folders of processes of ours that have died."""
    for folder in map(Path, folders):
        for path in folder.iterdir() if folder.is_dir() else ():
            found = LEFT.search(path.name)
            if not found or found[1] != process_tag()[:8] or _alive(int(found[2])):
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
    except OSError:  # somebody else's
        pass
    return True


# ---- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path, remedy):
    """Within it whatever a damaged file makes its reader raise becomes a ModelError about `path`."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, pickle.PickleError,
            zipfile.BadZipFile, zlib.error) as fault:  # fmt: skip
        why = fault.strerror if isinstance(fault, OSError) and fault.strerror else brief(fault)
        raise ModelError(f"{path} is cut short or damaged ({why}): {remedy}.") from None


def read_object(path, remedy):
    """The object of a JSON file. Raises ModelError if it holds none."""
    with reading(path, remedy):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object of names and values")
        return content


def fingerprint(path):
    """{"bytes", "sha256"} of a file."""
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def data_folder():
    """The folder that holds `mini/` and `questions/`: $AQAA_DATA, the clone's `data`, or where pip put it."""
    if named := os.environ.get("AQAA_DATA"):
        return Path(named)
    clone = Path(__file__).resolve().parents[1] / "data"
    return clone if clone.is_dir() else Path(sys.prefix) / "share" / "aqaa"


def named(names):
    """"a", or "a and 3 more"."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def check_file(path, remedy=TRAIN):
    """Is there a file, and not a Git LFS pointer, at path? Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"{path} is missing: {remedy}.")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`.")
