"""What `aqaa eval` can ask: the lineage, a server, a folder of answers, released peers.

Each has `name` and answer(turns) -> Reply, see `lineage.system`."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import soundfile

from aqaa.config import SAMPLE_RATE
from aqaa.evaluation import released_peers
from aqaa.files import ModelError, brief
from aqaa.lineage import registry
from aqaa.lineage.system import SILENCE, Reply

PATIENCE = 120.0  # s for an answer of a server


class SystemFault(OSError):
    """A system that is gone or sends what it should not, in one sentence: the run ends there, and
    what was answered is kept."""


class Recorded:
    """Answers that lie in a folder: ID.wav and ID.txt each; one that is missing is no answer."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.item = None  # whose answer is asked for; `evaluate` sets it

    def answer(self, turns):
        sound, words = (self.folder / f"{self.item}.{kind}" for kind in ("wav", "txt"))
        text = words.read_text(encoding="utf-8").strip() if words.is_file() else ""
        if not sound.is_file():
            return Reply(text, SILENCE)
        try:
            audio, rate = soundfile.read(sound, dtype="float32", always_2d=True)
        except (OSError, soundfile.LibsndfileError) as fault:
            said = f"{sound} is no sound file ({brief(fault)}): record it again."
            raise SystemFault(said) from None
        return Reply(text, audio.mean(1), rate)


def chat(server, body, pick, token="none"):
    """pick(message) of the answer of a server with OpenAI's /v1/chat/completions. Raises
    SystemFault where it is slow, gone, or answers otherwise."""
    header = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    place = server.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    try:
        asked = urllib.request.Request(place, json.dumps(body).encode(), header)
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            return pick(json.load(answer)["choices"][0]["message"])
    except urllib.error.HTTPError as fault:
        said = f"{server} refuses ({fault.code}): see its log, then go on with --resume."
        raise SystemFault(said) from None
    except (OSError, HTTPException) as fault:
        raise SystemFault(f"{server} does not answer ({brief(fault)}): is it running? --resume "
                          "goes on where it was lost.") from None  # fmt: skip
    except (ValueError, LookupError, TypeError, soundfile.LibsndfileError) as fault:
        raise SystemFault(f"{server} answers otherwise than OpenAI's chat ({brief(fault)}): name "
                          "another server.") from None  # fmt: skip


class Endpoint:
    """A server with OpenAI's /v1/chat/completions, sound in and out."""

    def __init__(self, url, model="aqaa", token="none"):
        self.name, self.model, self.token = url.rstrip("/"), model, token

    def answer(self, turns):
        messages, text = [], None
        for turn in turns:
            if text is not None:
                messages.append({"role": "assistant", "content": text})
            messages.append({"role": "user", "content": [_sound(turn)]})
            began = time.monotonic()
            body = {"model": self.model, "messages": messages, "modalities": ["text", "audio"],
                    "audio": {"voice": "aqaa", "format": "wav"}}  # fmt: skip
            text, audio, rate = chat(self.name, body, _spoken, self.token)
            took = time.monotonic() - began
        return Reply(text, audio, rate, took, took)


def _spoken(message):
    """(text, (N,), rate) of a message."""
    file = io.BytesIO(base64.b64decode(message["audio"]["data"]))
    audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return str.strip(message["audio"]["transcript"]), audio.mean(1), rate


def _sound(turn):
    """A message's part with the sound (N,) of a question."""
    file = io.BytesIO()
    soundfile.write(file, turn, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def make(name, load, seed=0, folder="work/lineage", device="cpu"):
    """A system by its name: one of the registry, the address of a server, a folder of answers, or
    PEER:FOLDER. load: a function that gives the model, called where it is needed; folder: where
    systems of the lineage were trained. Raises ModelError for another name."""
    if name in registry.SYSTEMS:
        return registry.system(name)(load(), seed, Path(folder) / name)
    if name.startswith(("http://", "https://")):
        return Endpoint(name)
    if Path(name).is_dir():
        return Recorded(name)
    peer, _, place = name.partition(":")
    if peer in released_peers.PEERS:
        return released_peers.make(peer, place, device, seed)
    peers = ", ".join(f"{peer}:FOLDER" for peer in released_peers.PEERS)
    raise ModelError(f"there is no system {name!r}: choose {', '.join(registry.SYSTEMS)}, the "
                     "address of a server, a folder with an ID.wav and ID.txt for each answer, or "
                     f"{peers}.")  # fmt: skip
