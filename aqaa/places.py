"""Where answers of `aqaa ask` go: checked before any work is done."""

import errno
import os
import stat
import tempfile
from pathlib import Path

LONGEST_NAME = 240  # bytes: file systems take 255, an answer's temporary file has a longer name


class Places:
    """Where answers go: one wav, or a folder that is made if need be. Raises ValueError or OSError
    before any work is done."""

    def __init__(self, output, questions, folder):
        self.path = Path(output or ("answers" if folder else "answer.wav"))
        is_folder, suffix = os.path.isdir(self.path), self.path.suffix.lower()
        self.folder = folder or is_folder
        self.questions = {os.path.realpath(question) for question in questions}
        self.taken, self.made, self.used = set(), False, False
        if output == "-":
            raise ValueError("answers are not written to stdout: name a wav or a folder with -o.")
        if not self.folder and suffix not in ("", ".wav"):
            fault = f"{self.path} would be written as wav"
            raise ValueError(f"{fault}: give it a name that ends in .wav.")
        if folder and suffix == ".wav" and not is_folder:
            fault = f"{self.path} would be one wav, and there may be several answers"
            raise ValueError(f"{fault}: name a folder with -o.")
        if os.path.realpath(self.path) in self.questions:
            raise ValueError(f"{self.path} is the question itself: choose another place with -o.")
        try:
            self._prepare()
        except OSError as fault:
            fault = f"{self.path} cannot be written ({fault.strerror})"
            raise OSError(f"{fault}: choose another place with -o.") from None

    def _prepare(self):
        if len(os.fsencode(self.path.name)) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, f"its name is longer than {LONGEST_NAME} bytes")
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            mode = None
        if mode and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return  # a device or a pipe
        parent = self.path if self.folder else Path(os.path.realpath(self.path)).parent
        if self.folder and not parent.exists():
            parent.mkdir(parents=True)
            self.made = True
        tempfile.TemporaryFile(dir=parent).close()

    def of(self, question):
        """The wav of an answer; questions of one name get numbers, long names are cut."""
        if not self.folder:
            return self.path
        stem, number = "stdin" if question == "-" else Path(question).stem, 1
        while len(os.fsencode(f"{stem}-9999.wav")) > LONGEST_NAME:
            stem = stem[:-1]
        place = self.path / f"{stem}.wav"
        while place in self.taken or os.path.realpath(place) in self.questions:
            number += 1
            place = self.path / f"{stem}-{number}.wav"
        self.taken.add(place)
        return place

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.made and not self.used:
            self.path.rmdir()
