"""Files: whole or not at all, through nobody's link, with nothing left behind; one sentence for what is damaged."""

import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aqaa import files
from aqaa.files import ModelError, WriteError, probe, read_object, reading, replacing, sweep, write_json

WRITERS = {  # of a megabyte, each by another library
    "plain": lambda part: part.write_bytes(b"x" * 2**20),
    "json": lambda part: part.write_text(json.dumps(["x" * 2**20]), encoding="utf-8"),
    "numpy": lambda part: np.save(open(part, "wb"), np.zeros(2**18)),
    "torch": lambda part: torch.save({"x": torch.zeros(2**18)}, part),
    "safetensors": lambda part: save_file({"x": torch.zeros(2**18)}, part),
}


def write(path, how="plain"):
    with replacing(path) as part:
        WRITERS[how](part)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WRITERS)
def test_a_file_appears_with_the_rights_of_any_new_file(tmp_path, how):
    path, before = tmp_path / "new" / "file", os.umask(0o027)
    try:
        write(path, how)
    finally:
        os.umask(before)
    assert names(path.parent) == ["file"] and path.stat().st_size >= 2**20
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError, OSError(5, "Input/output error"), SystemExit])
def test_what_fails_leaves_the_old_file_and_no_part(tmp_path, fault):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")
    with pytest.raises((fault if isinstance(fault, type) else WriteError, WriteError)):
        with replacing(path) as part:
            part.write_text("half", encoding="utf-8")
            raise fault
    assert names(tmp_path) == ["file"] and path.read_text(encoding="utf-8") == "old"


FILLS_UP = """
import resource, shutil, sys
from collections import namedtuple
from pathlib import Path
from aqaa.files import WriteError
from tests.test_files import WRITERS, write
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
shutil.disk_usage = lambda folder: namedtuple("Usage", "free")(0)
for how in WRITERS:
    try:
        write(Path(sys.argv[1], how), how)
    except WriteError as fault:
        print(how, fault)
"""


def test_a_disk_that_fills_up_is_one_sentence(tmp_path):
    """A limit on the size of files stands in for the disk: what it breaks off, it breaks off in the middle."""
    for how in WRITERS:
        (tmp_path / how).write_text("old", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", FILLS_UP, str(tmp_path)], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == len(WRITERS), done.stderr
    for how, line in zip(WRITERS, done.stdout.splitlines()):
        assert line.startswith(f"{how} {tmp_path / how} cannot be written (")
        assert line.endswith("): free some room there, or choose another folder.")
        assert (tmp_path / how).read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == sorted(WRITERS)


def test_a_fault_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        with replacing(tmp_path / "file"):
            open("/elsewhere/missing", encoding="utf-8")
    assert names(tmp_path) == []


def test_the_data_are_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *pair: done.append("renamed") or rename(*pair))
    write(tmp_path / "file")
    assert done[0].endswith(".part") and done[1:] == ["renamed", str(tmp_path)]


# ---- nobody's link --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "folder", "fifo"])
def test_a_part_is_never_something_that_lies_in_wait(tmp_path, monkeypatch, kind):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine", encoding="utf-8")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)  # a name that could be guessed
    trap = tmp_path / f".file.{files.process_tag()}.00000000.part"
    if kind in ("link", "dangling"):
        trap.symlink_to(victim if kind == "link" else tmp_path / "new")
    elif kind == "file":
        trap.write_text("planted", encoding="utf-8")
    elif kind == "folder":
        trap.mkdir()
    else:
        os.mkfifo(trap)
    with pytest.raises(WriteError, match="File exists"):
        write(path)
    assert victim.read_text(encoding="utf-8") == "mine" and not path.exists() and not (tmp_path / "new").exists()


def test_two_parts_have_two_names(tmp_path):
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as other:
        assert one != other
        one.write_text("1", encoding="utf-8")
        other.write_text("2", encoding="utf-8")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "1"  # the outer one ends last


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, steps):
    real = tmp_path / "real" / "file"
    write(real, "json")
    link = real
    for number in range(steps):
        (tmp_path / f"link{number}").symlink_to(link)
        link = tmp_path / f"link{number}"
    write(link)
    assert link.is_symlink() and real.read_bytes()[:1] == b"x" and names(real.parent) == ["file"]


@pytest.mark.parametrize("name", ["n" * 244, "é" * 120, "a[b]*?", os.fsdecode(b"\xff\xfe"), ".part", "-"])
def test_any_name_that_a_file_can_have(tmp_path, name):
    write(tmp_path / name)
    assert names(tmp_path) == [name]


def test_a_device_is_written_in_place(tmp_path):
    write(Path("/dev/null"))
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError):
        write(tmp_path / "full")
    assert names(tmp_path) == ["full"] and stat.S_ISCHR(os.stat("/dev/null").st_mode)


# ---- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file/below", "/proc/new", "n" * 300, "locked"])
def test_a_place_where_nothing_can_be_written_is_told_at_once(tmp_path, place):
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = tmp_path / place
    user = os.geteuid()
    if place == "locked":
        folder.mkdir()
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # rights do not bind root
    try:
        with pytest.raises(WriteError, match="cannot be written .*choose another folder"):
            probe(folder)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("need", [0, 10**6, 10**18])
def test_room_is_asked_for(tmp_path, need):
    if need < 10**18:
        probe(tmp_path / "new", need)
        assert names(tmp_path / "new") == []
    else:
        with pytest.raises(WriteError, match=r"\d+ MB are free, 1000000000000 MB are needed"):
            probe(tmp_path / "new", need)


# ---- what dead processes leave --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from aqaa import files
files.MEMORY, folder = sys.argv[1:]
kind = {"part": files.replacing(Path(folder, "file")), "scratch": files.scratch()}
with kind["part"] as part, kind["scratch"] as place:
    part.write_text("half")
    (place / "0.wav").write_text("sound")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_left_overs_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path, monkeypatch):
    memory, folder = tmp_path / "memory", tmp_path / "folder"
    memory.mkdir()
    monkeypatch.setattr(files, "MEMORY", str(memory))
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(memory), str(folder)])
    (folder / "file").write_text("whole", encoding="utf-8")
    (folder / ".other.part").write_text("somebody's", encoding="utf-8")
    (memory / "aqaa-notes").mkdir()
    assert len(names(folder)) == 4 and len(names(memory)) == 3
    with replacing(folder / "file") as part, files.scratch() as place:
        part.write_text("new", encoding="utf-8")
        sweep(folder, tmp_path / "missing")
        files.sweep_scratch()
        assert names(folder) == sorted([".other.part", "file", part.name])
        assert names(memory) == sorted(["aqaa-notes", place.name])
    assert (folder / "file").read_text(encoding="utf-8") == "new" and names(memory) == ["aqaa-notes"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_scratch_folder_goes_with_its_use(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(files, "MEMORY", str(tmp_path))
    with pytest.raises(fault), files.scratch() as place:
        (place / "deep").mkdir()
        raise fault
    assert names(tmp_path) == []


def test_memory_without_room_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MEMORY", str(tmp_path))
    monkeypatch.setattr(files, "SPARE", 10**18)
    with files.scratch() as place:
        assert place.parent != tmp_path


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\0" * 9, b"\xff\xfe{}", b"[" * 100_000, b"null"])
def test_half_a_json_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="record.json is cut short or damaged .*: remove it.$") as fault:
        read_object(path, "remove it")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("fault", [EOFError("cut"), zipfile.BadZipFile("no zip"), KeyError("ids"), RuntimeError("a\n")])
def test_whatever_a_reader_raises_is_one_sentence(fault):
    with pytest.raises(ModelError, match=r"codes.npz is cut short or damaged \(.+\): run it again.$"):
        with reading("codes.npz", "run it again"):
            raise fault


def test_what_is_written_can_be_read(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_object(tmp_path / "a.json", "") == {"ä": [1, None]}
    assert files.fingerprint(tmp_path / "a.json")["bytes"] == (tmp_path / "a.json").stat().st_size


def test_there_is_one_atomic_writer():
    root = Path(files.__file__).parent
    rename = re.compile(r"os\.(replace|rename)\(|\.rename\(|NamedTemporaryFile|mkstemp")
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    found = {name: len(rename.findall(text)) for name, text in texts.items()}
    writes, keeps, restores = 1, 1, 1
    assert {name: n for name, n in found.items() if n} == {"files.py": writes + keeps + restores}


def test_the_earlier_file_is_kept_once_and_comes_back(tmp_path):
    path, kept = tmp_path / "file", tmp_path / "file.previous"
    for number in "123":
        with replacing(path, keep=kept) as part:
            part.write_text(number, encoding="utf-8")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        raise ZeroDivisionError
    assert [path.read_text(encoding="utf-8"), kept.read_text(encoding="utf-8")] == ["3", "2"]
    files.restore(path, kept)
    assert names(tmp_path) == ["file"] and path.read_text(encoding="utf-8") == "2"
