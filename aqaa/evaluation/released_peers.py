"""Released peers under `aqaa eval`: Qwen2-Audio, Qwen2.5-Omni, Qwen3-Omni, Kimi-Audio.

`--system NAME:FOLDER` loads one from a folder, `--system NAME:REPOSITORY` from its repository, and
only then; size and licence are told first. The Qwen are classes of transformers, Kimi-Audio is its
makers' package `kimia_infer`. Their minis are systems of the lineage, under names of their own."""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch

from aqaa.config import SAMPLE_RATE
from aqaa.files import ModelError, brief, scratch
from aqaa.lineage.system import SILENCE, Reply

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".model")
RATE = 24_000  # Hz of all that speak
LONGEST, SPOKEN = 256, 1500  # tokens of an answer in words, and in sound
FAULTS = OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError
SPEAKER = (  # of its model card
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
    "perceiving auditory and visual inputs, as well as generating text and speech."
)


@dataclass(frozen=True)
class Peer:
    """repository, size in GB and licence of the released weights; kind: its class; system: what
    must stand first, or it does not speak."""

    repository: str
    size: str
    licence: str
    kind: str
    system: str = ""
    speaks: bool = True


PEERS = {
    "qwen2-audio": Peer("Qwen/Qwen2-Audio-7B-Instruct", "17", "Apache-2.0",
                        "Qwen2AudioForConditionalGeneration", speaks=False),
    "qwen2.5-omni": Peer("Qwen/Qwen2.5-Omni-7B", "22", "Apache-2.0",
                         "Qwen2_5OmniForConditionalGeneration", SPEAKER),
    "qwen3-omni": Peer("Qwen/Qwen3-Omni-30B-A3B-Instruct", "71", "Apache-2.0",
                       "Qwen3OmniMoeForConditionalGeneration"),
    "kimi-audio": Peer("moonshotai/Kimi-Audio-7B-Instruct", "more than 20", "MIT", "kimia_infer"),
}  # fmt: skip


def make(name, place, device="cpu", seed=0):
    """The peer `name` from a folder or its own repository. Raises ModelError."""
    peer = PEERS[name]
    if not place or place != peer.repository and not Path(place).is_dir():
        raise ModelError(f"{name} is at no folder {place!r} ({peer.size} GB of "
                         f"weights, licence {peer.licence}): write {name}:{peer.repository} to "
                         f"fetch them, or {name}:FOLDER.")  # fmt: skip
    print(f"{name}: {told(name, place)}", file=sys.stderr)
    try:
        if peer.kind == "kimia_infer":
            from kimia_infer.api.kimia import KimiAudio

            return Kimi(name, KimiAudio(model_path=place, load_detokenizer=True), seed=seed)
        import transformers

        processor = transformers.AutoProcessor.from_pretrained(place)
        placed = {"device_map": device} if device != "cpu" else {}
        kind = getattr(transformers, peer.kind)
        model = kind.from_pretrained(place, dtype="auto", **placed).eval()
        return Released(name, model, processor, seed)
    except FAULTS as fault:
        raise ModelError(f"{name} cannot be loaded from {place} ({brief(fault)}): get the whole "
                         "folder, and what its model card says to install.") from None  # fmt: skip


def told(name, place):
    """Size and licence, of the folder where there is one."""
    peer, card = PEERS[name], Path(place) / "README.md"
    files = [path for path in Path(place).rglob("*") if path.suffix in WEIGHTS]
    size = f"{sum(path.stat().st_size for path in files) / 1e9:.1f}" if files else peer.size
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license(?:_name)?: *(\S+)", text, re.MULTILINE)
    return f"{size} GB of weights, licence {found[1] if found else peer.licence}"


class Released:
    """A class of transformers that hears; the Omni speak as well."""

    def __init__(self, name, model, processor=None, seed=0):
        self.name, self.model, self.processor = f"released-{name}", model, processor
        self.peer, self.speaks, self.seed = PEERS[name], PEERS[name].speaks, seed

    def answer(self, turns):
        said = []  # sounds of the user and words of its own, in turn
        for number, turn in enumerate(turns, 1):
            began = time.monotonic()
            torch.manual_seed(self.seed)
            with torch.inference_mode():  # earlier answers need no sound
                text, sound = self._next([*said, turn], self.speaks and number == len(turns))
            said += [turn, text.strip()]
        took = time.monotonic() - began
        sound = SILENCE if sound is None else sound.float().reshape(-1).cpu().numpy()
        return Reply(said[-1], sound, RATE, took, took)

    def _next(self, said, speak):
        """(text, sound or None) of the next answer."""
        first = [("system", "text", self.peer.system)] if self.peer.system else []
        parts = first + [("user", "audio", "") if i % 2 == 0 else ("assistant", "text", part)
                         for i, part in enumerate(said)]  # fmt: skip
        messages = [{"role": role, "content": [{"type": kind, kind: part}]}
                    for role, kind, part in parts]  # fmt: skip
        prompt = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False)  # fmt: skip
        inputs = self.processor(
            text=prompt, audio=said[::2], sampling_rate=SAMPLE_RATE, return_tensors="pt",
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        if not self.speaks:
            options = {"max_new_tokens": LONGEST}
        else:
            options = {"thinker_max_new_tokens": LONGEST, "talker_max_new_tokens": SPOKEN}
            options |= {} if speak else {"generation_mode": "text"}
        made, sound = self.model.generate(**inputs, **options), None
        if speak:
            made, sound = made
            sound = sound[0] if isinstance(sound, (list, tuple)) else sound
        ids = getattr(made, "sequences", made)[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(ids, skip_special_tokens=True)[0], sound


class Kimi(Released):
    """Kimi-Audio's own package, which reads its sounds from files."""

    def _next(self, said, speak):
        messages = []
        with scratch() as folder:
            for i, part in enumerate(said):
                kind, role = ("text", "assistant") if i % 2 else ("audio", "user")
                if kind == "audio":
                    soundfile.write(folder / f"{i}.wav", part, SAMPLE_RATE)
                    part = str(folder / f"{i}.wav")
                messages.append({"role": role, "message_type": kind, "content": part})
            sound, text = self.model.generate(messages, output_type="both" if speak else "text")
        return text, sound
