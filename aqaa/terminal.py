"""`aqaa talk`: a microphone and a loudspeaker around a Conversation, in a terminal."""

import queue
import sys
import threading
from collections import deque
from contextlib import closing, contextmanager

import numpy as np
import torch

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.conversation import Conversation

BLOCK = 320  # samples of a callback: 20 ms
FORMAT = {"samplerate": SAMPLE_RATE, "channels": 1, "dtype": "float32"}
GONE = 5.0  # seconds without a packet
NO_LIBRARY = (
    "a microphone needs sounddevice and PortAudio: pip install 'aqaa[talk]' (Debian: apt install "
    "libportaudio2 too), or ask with files: aqaa chat."
)
NO_MICROPHONE = (
    "there is no microphone or loudspeaker that can be used ({}): plug one in, or ask with files: "
    "aqaa chat."
)
WELCOME = "Speak; a pause ends your turn, speaking interrupts. Use headphones. Ctrl-C ends."


class Speaker:
    """Sound that waits to be played: `fill` hands it to a sound card, `clear` drops it at once.

    rate: Hz of what is put in; it comes out at SAMPLE_RATE, in one piece however it was cut.
    """

    def __init__(self, rate):
        self.rate, self.waiting = rate, deque()  # of (n,) arrays
        self._lock = threading.Lock()  # else what `fill` gives back could outlive a `clear`
        self._resampled = audio.Resampled(rate, SAMPLE_RATE)

    def put(self, wav):
        """(N,) samples, after what waits."""
        self.waiting.append(self._resampled.push(wav).numpy())

    def end(self):
        """An answer is whole."""
        self.waiting.append(self._resampled.finish().numpy())
        self._resampled = audio.Resampled(self.rate, SAMPLE_RATE)

    def clear(self):
        with self._lock:
            self.waiting.clear()
        self._resampled = audio.Resampled(self.rate, SAMPLE_RATE)

    def fill(self, out):
        """Write the next samples into (n,) `out`, then zeros."""
        at = 0
        with self._lock:
            while at < len(out) and self.waiting:
                wav = self.waiting.popleft()
                n = min(len(wav), len(out) - at)
                out[at : at + n] = wav[:n]
                if n < len(wav):
                    self.waiting.appendleft(wav[n:])
                at += n
        out[at:] = 0


def sound_library():
    """The module sounddevice. Raises ValueError where it, PortAudio, or a sound card is missing."""
    try:
        import sounddevice
    except (ImportError, OSError):
        raise ValueError(NO_LIBRARY) from None
    with _microphone(sounddevice):
        sounddevice.check_input_settings(**FORMAT)
        sounddevice.check_output_settings(**FORMAT)
    return sounddevice


@contextmanager
def _microphone(library):
    """Faults of a sound card become one sentence, a ValueError."""
    try:
        yield
    except (library.PortAudioError, ValueError) as fault:
        raise ValueError(NO_MICROPHONE.format(str(fault).split("\n")[0])) from None


def talk(model, *, out=sys.stdout, library=None, **options):
    """Converse until Ctrl-C; words go to `out`. options: of Conversation. Raises ValueError."""
    library = library or sound_library()
    heard, speaker = queue.SimpleQueue(), Speaker(model.vocoder.sample_rate)

    def callback(recorded, played, *_):  # by a thread of the sound card: copy, and be gone
        heard.put(recorded[:, 0].copy())
        speaker.fill(played[:, 0])

    conversation = Conversation(model, **options)
    with _microphone(library):
        stream = library.Stream(**FORMAT, blocksize=BLOCK, callback=callback)
        stream.start()
    with closing(stream):
        print(WELCOME, file=out, flush=True)
        try:
            while True:
                converse(conversation, heard, speaker, out)
        except KeyboardInterrupt:
            speaker.clear()


def converse(conversation, heard, speaker, out):
    """Take what the microphone has brought, then do one unit of work; waits if there is none.
    Raises ValueError where nothing comes any more."""
    try:
        packets = [] if conversation.busy else [heard.get(timeout=GONE)]
    except queue.Empty:
        fact = f"the microphone has brought nothing for {GONE:g} s"
        raise ValueError(f"{fact}: plug it in again.") from None
    while not heard.empty():
        packets.append(heard.get())
    events = conversation.push(torch.from_numpy(np.concatenate(packets))) if packets else []
    show(events, speaker, out)
    show(conversation.work(), speaker, out)


def show(events, speaker, out):
    """Events as sound and as words."""
    for event in events:
        if event.kind == "interrupted":
            speaker.clear()
            print(" —", file=out, flush=True)
        elif event.kind == "piece":
            print(event.text, end="", file=out, flush=True)
            speaker.put(event.audio)
        elif event.kind == "answered":
            speaker.end()
            print(file=out, flush=True)
        elif event.kind in ("transcribed", "refused"):
            print(f"({event.text})", file=out, flush=True)
