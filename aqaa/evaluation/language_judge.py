"""A language model grades answers from 1 to 5: Chat, Relevance, Factuality (AQAA paper 4).

The judge is a server with OpenAI's chat or a local transformers folder. It reads what was written
and what an open recogniser heard, and never the sound. Prompts and raw verdicts are kept, a line
each, so that judging goes on where it was lost; a verdict that does not parse is counted, never
guessed. `audit` tells how far a judge is moved by what must not matter."""

import hashlib
import json
import os
import re
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from aqaa import audio
from aqaa.corpus import plan as P
from aqaa.evaluation import quality, whisper
from aqaa.evaluation.agreement import between, kappa, ranked
from aqaa.evaluation.mos import mean, wilson
from aqaa.evaluation.systems import chat
from aqaa.files import ModelError, brief

PROMPTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ASPECTS = PROMPTS["aspects"]
ENDS = PROMPTS["ends"]
RIGHT = 4  # a grade that counts as right beside the rules
WORDS = 160  # tokens of a verdict


class Server:
    """A server with OpenAI's chat; URL#NAME names its model, $OPENAI_API_KEY is sent to it."""

    def __init__(self, url):
        self.name, (self.url, _, model) = url, url.partition("#")
        self.model, self.token = model or "judge", os.environ.get("OPENAI_API_KEY", "none")

    def ask(self, prompt, end):
        body = {"model": self.model, "temperature": 0, "max_tokens": WORDS,
                "messages": [{"role": "user", "content": prompt}]}  # fmt: skip
        return chat(self.url, body, lambda message: str(message["content"] or ""), self.token)


class Local:
    """A model in a folder, judging by its chances for the end of a verdict (G-Eval, 2303.16634)."""

    def __init__(self, folder, device="cpu"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name, given = Path(folder).name, {"local_files_only": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **given)
            self.model = AutoModelForCausalLM.from_pretrained(folder, **given).to(device).eval()
        except (OSError, ValueError, LookupError, TypeError, ImportError) as fault:
            said = f"{folder} is no language model of transformers ({brief(fault)})"
            raise ModelError(f"{said}: name one with weights and a tokenizer.") from None

    @torch.no_grad()
    def ask(self, prompt, end):
        """"Score: 2.62", the mean of the grades by their chances, or "Better: second"."""
        if self.tokenizer.chat_template:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ends = [self.tokenizer(f"{prompt}{end}: {word}").input_ids for word in ENDS[end]]
        read = os.path.commonprefix(ends)  # all that comes before the token that tells them apart
        logits = self.model(torch.tensor([read], device=self.model.device)).logits[0, -1]
        probs = logits[[ids[len(read)] for ids in ends]].softmax(0).tolist()
        if end == "Score":
            return f"Score: {sum(int(word) * p for word, p in zip(ENDS[end], probs)):.2f}"
        return f"{end}: {ENDS[end][int(np.argmax(probs))]}"


def make(name, device="cpu"):
    """A judge by its address or folder. Raises ModelError."""
    if name.startswith(("http://", "https://")):
        return Server(name)
    if Path(name).is_dir():
        return Local(name, device)
    raise ModelError(f"there is no judge {name!r}: name the address of a server with OpenAI's "
                     "chat, or a folder of transformers.")  # fmt: skip


def parsed(verdict, word="Score", values=r"[1-4](?:\.\d\d)?|5(?:\.00)?"):
    """What a verdict says behind "Score:" (or "Better:"); None where it says nothing there, or
    different things."""
    found = re.findall(rf"\b{word}\W{{1,5}}({values})(?![.,/]?\d)\b", verdict, re.IGNORECASE)
    return found[0].lower() if len(set(map(str.lower, found))) == 1 else None


class Verdicts:
    """The file of raw verdicts beside a run: what a judge has told is not asked again."""

    def __init__(self, path, judge):
        self.path, self.judge, self.known = Path(path), judge, {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in kept.splitlines():
            try:
                row = json.loads(line)
                self.known[row["judge"], row["prompt"]] = row["verdict"]
            except (ValueError, LookupError, TypeError):
                continue  # the prompts, or a line that was cut off: it is asked again
        self._write("\n", PROMPTS)

    def _write(self, before, row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{before}{json.dumps(row)}\n")

    def ask(self, what, prompt, end="Score"):
        """The raw verdict on a prompt. Raises SystemFault where the judge is lost."""
        key = self.judge.name, hashlib.sha256(prompt.encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = self.judge.ask(prompt, end)
            self._write("", {"what": what, **dict(zip(("judge", "prompt"), key)),
                             "verdict": self.known[key]})  # fmt: skip
        return self.known[key]

    def grades(self, row, text, what, aspects=tuple(ASPECTS)):
        """{aspect: 1 to 5, or None} of a text as the answer to a row's question."""
        prompt, told = _filled(PROMPTS["grade"], row, answer=text), {}
        for aspect in aspects:
            asked = prompt.replace("{aspect}", ASPECTS[aspect])
            score = parsed(self.ask(f"{row['id']} {what} {aspect}", asked))
            told[aspect] = score and float(score)
        return told


def _filled(prompt, row, **parts):
    """A prompt with its data, in which nothing can close a tag."""
    asked = " … ".join(filter(None, row["asked"])) or "(only spoken)"
    right = f"<right>{row['expected']}</right>\n" if row.get("expected") else ""
    for name, part in {"question": asked, **parts}.items():
        prompt = prompt.replace(f"{{{name}}}", part.replace("<", "(").replace(">", ")"))
    return prompt.replace("{reference}", right)


def grade(verdicts, rows):
    """{id: {"text": {aspect: 1 to 5 or None}, "speech": …}}. Speech is judged by its open
    transcript; where that is what was written, the verdict is the same."""
    found = {}
    for row in tqdm(rows, f"judge {verdicts.judge.name}", leave=False):
        mine = found[row["id"]] = {"text": verdicts.grades(row, row["written"], "text")}
        if (heard := row.get("transcribed")) is not None:
            same = heard == whisper.words(row["written"])
            mine["speech"] = mine["text"] if same else verdicts.grades(row, heard, "speech")
    return found


def ceiling(verdicts, rows):
    """Share of the *right* answers whose factuality a judge grades RIGHT or more, as of `wilson`;
    None where no row tells its right answer."""
    marks = [verdicts.grades(row, row["expected"], "ceiling", ["factuality"])["factuality"]
             for row in rows if row.get("expected")]  # fmt: skip
    return wilson(sum((mark or 0) >= RIGHT for mark in marks), len(marks)) if marks else None


def ears(found, rows, name):
    """What each judge says of the same spoken answers, those with one right sentence: {"rule":
    [text right, …], "pocketsphinx", "Whisper", name}."""
    rows = [row for row in rows if row.get("agrees") is not None and row.get("transcribed")]
    graded = [found[row["id"]]["speech"]["factuality"] for row in rows]
    return {
        "rule": [row["text"] for row in rows], "pocketsphinx": [row["spoken"] for row in rows],
        "Whisper": [row["transcribed"] == whisper.words(row["expected"]) for row in rows],
        name: [mark and mark >= RIGHT for mark in graded],
    }  # fmt: skip


def summarise(found, rows, summary, name="judge"):
    """{"verdicts", "unparsed", "agreement", "judges"}; means of each category go into `summary`.
    agreement: κ of a factuality of 4 or more and the rules, in text and in speech, and `ranked` of
    the factuality itself; judges: κ of each two of `ears`."""
    for group, scores in summary.items():
        mine = [found[row["id"]] for row in rows if group in ("all", row["category"])]
        for aspect in ASPECTS:
            for side, key in (("text", aspect), ("speech", f"{aspect}_speech")):
                if marks := [one[side][aspect] for one in mine if one.get(side, {}).get(aspect)]:
                    scores[key] = mean(marks)
    grades = [score for one in found.values() for side in one.values() for score in side.values()]
    told = {"verdicts": len(grades), "unparsed": grades.count(None), "agreement": {}}
    for side, rule in (("text", "text"), ("speech", "spoken")):
        pairs = [(row[rule], score) for row in rows if row.get(rule) is not None
                 and (score := found[row["id"]].get(side, {}).get("factuality"))]  # fmt: skip
        if pairs:
            marks = kappa([right for right, _ in pairs], [score >= RIGHT for _, score in pairs])
            told["agreement"][side] = {"n": len(pairs), **marks, "ranked": ranked(pairs)}
    return told | {"judges": between(ears(found, rows, name))}


def audit(verdicts, rows, sounds, count):
    """{"louder", "longer", "repeated": {aspect: mean change of the grade}, "heard_alike",
    "quality"} of `count` answers. louder: by 6 dB, in what the recogniser makes of the sound;
    heard_alike: share of transcripts that stay; quality: what DNSMOS changes. sounds: the folder
    of ID.ogg."""
    shifts, alike, better = {}, [], []
    chosen = P.spread([row for row in rows if row["written"]], count)
    for row in chosen:
        text, base = row["written"], verdicts.grades(row, row["written"], "text")
        moved = {"longer": (text + PROMPTS["filler"], base), "repeated": (f"{text} {text}", base)}
        samples, rate = soundfile.read(Path(sounds) / f"{row['id']}.ogg", dtype="float32")
        wav = np.asarray(audio.resample(samples, rate), np.float32) / 2
        if not whisper.missing():
            heard, louder = whisper.heard(wav), whisper.heard(2 * wav)
            alike.append(heard == louder)
            moved["louder"] = louder, verdicts.grades(row, heard, "softer")
        if (before := quality.dnsmos(wav)) is not None:
            better.append(quality.dnsmos(2 * wav) - before)
        for name, (words, before) in moved.items():
            for aspect, after in verdicts.grades(row, words, name).items():
                if before[aspect] and after:
                    marks = shifts.setdefault(name, {}).setdefault(aspect, [])
                    marks.append(after - before[aspect])
    told = {name: {aspect: mean(marks, (-4, 4)) for aspect, marks in one.items()}
            for name, one in shifts.items()}  # fmt: skip
    return {"n": len(chosen), **told,
            "heard_alike": wilson(sum(alike), len(alike)) if alike else None,
            "quality": mean(better, (-4, 4)) if better else None}  # fmt: skip


def prefer(verdicts, ours, theirs):
    """{"n", "first", "second", "equal", "order", "unparsed"} of two runs: each pair of answers is
    shown twice, in both orders; `order` counts those where the place decided."""
    others, told = {row["id"]: row for row in theirs}, Counter()
    for row in ours:
        said, asked = [], (row["written"], others.get(row["id"], {}).get("written"))
        for first, second in ((0, 1), (1, 0)) if asked[1] is not None else ():
            prompt = _filled(PROMPTS["pair"], row, first=asked[first], second=asked[second])
            verdict = parsed(verdicts.ask(f"{row['id']} pair", prompt, "Better"), "Better",
                             "|".join(ENDS["Better"]))  # fmt: skip
            swapped = {"first": "second", "second": "first"} if first else {}
            said.append(swapped.get(verdict, verdict))
        if said:
            one = said[0] if said[0] == said[1] else "order"
            told.update(["n", "unparsed" if None in said else one])
    return {name: told[name] for name in ("n", "first", "second", "equal", "order", "unparsed")}
