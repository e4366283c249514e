"""The command line: arguments in, package calls, exit code out (0 done, 1 could not, 2 usage).

Nothing heavy is imported before it is known what to do. A fault the user can mend is one sentence on stderr.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from aqaa import __version__

STAGES = (
    "corpus", "features", "linguistic", "semantic", "codes", "hift", "flow", "pretrain", "sft1", "export", "all",
)  # fmt: skip
BENCHES = {
    "speed": "aqaa.bench",
    "accuracy": "aqaa.evaluation.accuracy",
    "synthesis": "aqaa.evaluation.synthesis",
    "codes": "aqaa.evaluation.codes",
    "parts": "aqaa.evaluation.parts",
    "quantize": "aqaa.scale.fidelity",
    "streaming": "aqaa.evaluation.streaming",
    "scale": "aqaa.scale.record",
}
RELEASED = {  # option: what its folder holds
    "tokenizer": "Step-Audio-Tokenizer",
    "backbone": "Step-Audio-AQAA or another Step-1 model",
    "vocoder": "CosyVoice-300M-25Hz of Step-Audio-TTS-3B",
}
LONGEST_DIALOGUE = 8192  # ids that the fast engine keeps room for
UNSURE = 0.5  # confidence below which the printed answer is marked


def main(argv=None):
    """Run `aqaa argv…` and return its exit code."""
    try:
        args = _parser().parse_args(argv)
        code = args.run(args) or 0
        sys.stdout.flush()  # here, where a broken pipe is caught
        return code
    except SystemExit as end:  # argparse: --help, --version, or wrong usage
        return end.code
    except KeyboardInterrupt:
        return _complain("interrupted")
    except BrokenPipeError:  # the reader of our output has gone, as in `aqaa doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as fault:
        return _complain(f"{fault.name} is not installed: pip install -e '.[test,train]' brings it")
    except (ValueError, OSError) as fault:
        return _complain(fault)


def _complain(fault):
    print("aqaa:", " ".join(str(fault).split()), file=sys.stderr)
    return 1


def _parser():
    parser = argparse.ArgumentParser(prog="aqaa", description="A spoken question goes in, a spoken answer comes out.")
    parser.add_argument("--version", action="version", version=f"aqaa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument("--preset", default="mini", metavar="NAME", help="mini, a folder with weights, or full")
    for role, what in RELEASED.items():
        sampling.add_argument(f"--{role}", metavar="FOLDER", help=f"{what}, in place of the preset's")
    sampling.add_argument("--speaker", metavar="WAV", help="a recording whose voice the released vocoder takes")
    sampling.add_argument("--dtype", metavar="NAME", help="bfloat16, float16 or float32: of backbone and flow")
    sampling.add_argument("--engine", metavar="URL", help="a vLLM server that generates, or fast: our GPU kernels")
    sampling.add_argument("--amx", action="store_true", help="tokenizers and flow on the matrix units of a Xeon")
    sampling.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    sampling.add_argument("--seed", type=int, default=0, help="same seed, same answer")
    sampling.add_argument("--temperature", type=_not_negative, help="0 takes the likeliest token")
    sampling.add_argument("--top-p", type=_share, help="sample among the likeliest tokens of this total")
    sampling.add_argument("--json", action="store_true", help="one JSON object a line")

    ask = commands.add_parser("ask", parents=[sampling], help="answer spoken questions")
    ask.add_argument("questions", nargs="+", metavar="QUESTION", help="a sound file: wav, flac, ogg, mp3")
    ask.add_argument("-o", "--output", metavar="OUT", help="a wav (answer.wav); of several a folder (answers)")
    ask.add_argument("--stream", action="store_true", help="show the words while the answer is being made")
    ask.set_defaults(run=_ask, chat=False)

    chat = commands.add_parser("chat", parents=[sampling], help="several turns, each question a file")
    chat.add_argument("questions", nargs="*", metavar="QUESTION", help="sound files; without any, names on stdin")
    chat.add_argument("-o", "--output", metavar="OUT", help="folder of the answers (answers)")
    chat.set_defaults(run=_ask, chat=True, stream=False)

    listen = commands.add_parser("listen", parents=[sampling], help="show every token between question and answer")
    listen.add_argument("question", metavar="QUESTION")
    listen.set_defaults(run=_listen)

    train = commands.add_parser("train", help="train a part of the mini, or all of it")
    train.add_argument("stage", choices=STAGES, metavar="STAGE", help=" ".join(STAGES))
    train.add_argument("--out", default="work/mini", help="folder of the run (%(default)s)")
    train.add_argument("--corpus", default="work/corpus", help="folder of the spoken corpus (%(default)s)")
    train.add_argument("--export", default="data/mini", help="folder of the finished model (%(default)s)")
    train.add_argument("--device", default="cpu")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--init", metavar="FOLDER", help="model folder to start from, such as data/mini")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--steps", type=_count, help="in place of the stage's own number")
    train.add_argument("--minutes", type=float, help="end each stage, schedule included, after this much training time")
    train.add_argument("--scale", type=_share, default=1.0, help="share of the corpus and of the steps")
    train.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes (%(default)s)")
    train.set_defaults(run=_train)

    bench = commands.add_parser("bench", help=f"measure one of {', '.join(BENCHES)}")
    bench.add_argument("what", nargs="?", default="speed", choices=BENCHES)
    bench.add_argument("--preset", default="mini", metavar="NAME")
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--corpus", default="work/corpus", help="accuracy: folder of evaluation questions (%(default)s)")
    bench.add_argument("--limit", type=_count, metavar="N", help="how many questions of each cell")
    bench.add_argument("--layers", type=_count, metavar="N", help="scale: so many layers of those of --preset full")
    bench.add_argument("--only", choices=("linguistic", "semantic", "flow", "hift", "backbone"), help="parts: this one")
    bench.add_argument("--text-only", action="store_true", help="accuracy: leave the sound and its judge out")
    bench.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes (%(default)s)")
    bench.add_argument("--json", action="store_true")
    bench.add_argument("--out", metavar="FILE", help="also write the numbers to this JSON file")
    bench.set_defaults(run=_bench)

    plan = commands.add_parser("plan", help="what a language model needs on given GPUs, and how fast it will talk")
    plan.add_argument("model", nargs="?", default="130b", metavar="MODEL", help="130b, 3b, mini, or a folder")
    plan.add_argument("--gpus", action="append", default=[], metavar="4xH100-80", help="again for another row")
    plan.add_argument("--weights", choices=("bf16", "fp8", "int8", "int4"), help="all of them, if not given")
    plan.add_argument("--group", type=_count, metavar="N", help="inputs that share a scale in int4: 128, 64, 32")
    plan.add_argument("--context", type=_count, default=2048, metavar="IDS", help="(%(default)s)")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run=_plan)

    convert = commands.add_parser("convert", help="quantise a language model, a layer at a time")
    convert.add_argument("source", metavar="SOURCE", help="mini, a folder like it, or a released language model")
    convert.add_argument("out", metavar="OUT", help="folder of the result; an interrupted one is gone on with")
    convert.add_argument("--weights", choices=("int4", "int8", "fp8"), default="int4", help="(%(default)s)")
    convert.add_argument("--group", type=_count, metavar="N", help="inputs that share a scale in int4 (128)")
    convert.add_argument("--method", choices=("rtn", "gptq"), default="rtn", help="rtn rounds each weight by itself")
    convert.add_argument("--calibration", metavar="FILE", help="gptq: JSON, a list of dialogues, each a list of ids")
    convert.add_argument("--device", default="cpu", help="where to quantise (%(default)s)")
    convert.add_argument("--json", action="store_true")
    convert.set_defaults(run=_convert)

    doctor = commands.add_parser("doctor", help="versions, devices, speech engines, weights; what a folder holds")
    doctor.add_argument("folders", nargs="*", metavar="FOLDER", help="released folders, or ones like the mini")
    doctor.add_argument("--preset", default="mini", metavar="NAME")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    return parser


def _not_negative(text):
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def _count(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _share(text):
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError("must be above 0, and 1 at most")
    return value


def _sampling(args):
    chosen = {"seed": args.seed, "temperature": args.temperature, "top_p": args.top_p}
    return {name: value for name, value in chosen.items() if value is not None}


# ---- ask, chat ------------------------------------------------------------------------------------------------------


def _ask(args):
    questions = args.questions or (line.strip() for line in sys.stdin if line.strip())
    with Places(args.output, args.questions, folder=args.chat or len(args.questions) > 1) as places:
        from aqaa import audio

        failed, model, respond = 0, None, None
        for question in questions:
            try:
                wav = audio.load_question(question), audio.SAMPLE_RATE
                place = places.of(question)
                if model is None:  # only now: a bad question is told at once
                    model = _load(args)
                    respond = _responder(model, args)
                answer = respond(wav)
                answer.save(place)
            except audio.AudioError as fault:
                failed += _complain(fault)
                if args.json:
                    print(json.dumps({"question": question, "error": str(fault)}), flush=True)
                continue
            places.used = True
            line = json.dumps(_facts(question, place, answer)) if args.json else _line(question, place, answer)
            print(line, flush=True)
    return int(failed > 0)


def _load(args):
    """The model of --preset and of the released folders; what was left out of them is told on stderr."""
    from aqaa import checkpoints

    engine = None
    if args.engine and args.engine != "fast":  # first: whether a server answers is known in a moment
        from aqaa.scale.vllm_engine import Server

        engine = Server(args.engine)
    folders = {name: getattr(args, name) for name in (*RELEASED, "speaker")}
    model = checkpoints.load(args.preset, device=args.device, dtype=args.dtype, amx=args.amx, **folders)
    if args.engine == "fast":
        from aqaa.scale.decode import Engine

        engine = Engine(model.backbone, min(LONGEST_DIALOGUE, model.config.backbone.max_seq_len))
    model.engine = engine
    for note in model.notes:
        print("aqaa: note:", note, file=sys.stderr)
    return model


def _responder(model, args):
    """A function from sound to Answer, as the arguments want it."""
    if args.chat:
        return model.chat(**_sampling(args)).ask
    if not args.stream:
        return lambda wav: model.ask(wav, **_sampling(args))

    def stream(wav):
        talk = model.stream(wav, **_sampling(args))
        for piece in talk:
            if not args.json:
                print(piece.text, end="", flush=True)
        if not args.json:
            print()
        return talk.answer

    return stream


def _facts(question, place, answer):
    return {
        "question": str(question),
        "text": answer.text,
        "audio": str(place),
        "seconds": round(answer.seconds, 3),
        "first_audio_ms": round(1000 * answer.timings["first_audio"]),
        "real_time_factor": round(answer.real_time_factor, 3),
        "confidence": round(answer.confidence, 4),
        "tokens": {name: len(answer.tokens[name]) for name in ("text", "linguistic", "semantic")},
    }


def _line(question, place, answer):
    doubt = "  (not sure)" if answer.confidence < UNSURE else ""
    return f"{question} -> {place}  {answer.seconds:.1f} s in {answer.timings['total']:.1f} s  {answer.text!r}{doubt}"


class Places:
    """Where answers go: one wav, or a folder that is made if need be. Raises OSError before any work is done."""

    def __init__(self, output, questions, folder):
        self.path = Path(output or ("answers" if folder else "answer.wav"))
        self.folder = folder or self.path.is_dir()
        self.questions = {os.path.realpath(question) for question in questions}
        self.taken, self.made, self.used = set(), False, False
        if not self.folder and self.path.suffix.lower() not in ("", ".wav"):
            raise ValueError(f"{self.path} would be written as wav: give it a name that ends in .wav.")
        if os.path.realpath(self.path) in self.questions:
            raise ValueError(f"{self.path} is the question itself: choose another place with -o.")
        self._prepare()

    def _prepare(self):
        parent = self.path if self.folder else Path(os.path.realpath(self.path)).parent
        if self.path.exists() and not self.path.is_file() and not self.path.is_dir():
            return  # a device or a pipe
        try:
            if self.folder and not parent.exists():
                parent.mkdir(parents=True)
                self.made = True
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as fault:
            raise OSError(f"{self.path} cannot be written ({fault.strerror}): choose another place with -o.") from None

    def of(self, question):
        """The wav of the answer to `question`; questions of one name get numbers."""
        if not self.folder:
            return self.path
        stem, number = Path(question).stem, 1
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


# ---- the other commands ---------------------------------------------------------------------------------------------


def _listen(args):
    from aqaa import audio
    from aqaa.tokenizers import interleave

    wav = audio.load_question(args.question)
    model = _load(args)
    heard = model.listen((wav, audio.SAMPLE_RATE))
    answer = model.ask(heard, **_sampling(args))
    linguistic, semantic = interleave.split(heard, model.ids)
    rows = {
        "linguistic": linguistic,
        "semantic": semantic,
        "merged": heard,
        "prompt": answer.tokens["prompt"],
        "answer": answer.tokens["answer"],
        "answer_linguistic": answer.tokens["linguistic"],
        "answer_semantic": answer.tokens["semantic"],
        "text": answer.text,
        "confidence": round(answer.confidence, 4),
        "timings": {name: round(seconds, 4) for name, seconds in answer.timings.items()},
    }
    if args.json:
        print(json.dumps({"question": args.question, "seconds": len(wav) / audio.SAMPLE_RATE, **rows}))
        return
    print(f"{args.question}: {len(wav) / audio.SAMPLE_RATE:.2f} s")
    for name, row in rows.items():
        print(f"{name} ({len(row)}): {' '.join(map(str, row))}" if isinstance(row, list) else f"{name}: {row}")


def _train(args):
    from aqaa.training import run

    options = {name: value for name, value in vars(args).items() if name not in ("run", "stage")}
    return run.main(args.stage, **options)


def _bench(args):
    return importlib.import_module(BENCHES[args.what]).main(args)


def _plan(args):
    from aqaa.scale import setups

    return setups.main(args)


def _convert(args):
    from aqaa.scale import convert

    return convert.main(args)


def _doctor(args):
    from aqaa import doctor

    return doctor.main(args)
