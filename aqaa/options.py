"""What can be typed after `aqaa`: the parser, and the faults that arguments and names of files show by themselves.

Nothing heavy is imported here, so that what is wrong with a command is said in the moment in which it is given.
"""

import argparse
import difflib
import errno
import os
import re
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit

from aqaa import __version__
from aqaa.training import stages

BENCHES = {
    "speed": "aqaa.evaluation.speed",
    "accuracy": "aqaa.evaluation.accuracy",
    "synthesis": "aqaa.evaluation.synthesis",
    "codes": "aqaa.evaluation.codes",
    "parts": "aqaa.evaluation.parts",
    "quantize": "aqaa.evaluation.quantization",
    "streaming": "aqaa.evaluation.streaming",
    "scale": "aqaa.evaluation.gpu_speed",
}
RELEASED = {  # option: what its folder holds
    "tokenizer": "Step-Audio-Tokenizer",
    "backbone": "Step-Audio-AQAA or another Step-1 model",
    "vocoder": "CosyVoice-300M-25Hz of Step-Audio-TTS-3B",
}
EXAMPLES = {
    "ask": "aqaa ask data/questions/product_q001959.wav -o answer.wav",
    "chat": "aqaa chat first.wav second.wav -o answers",
    "listen": "aqaa listen data/questions/product_q001959.wav --json",
    "train": "aqaa train sft1 --init data/mini --minutes 20",
    "bench": "aqaa bench speed --out speed.json",
    "plan": "aqaa plan 130b --gpus 4xH100-80 --weights int4",
    "convert": "aqaa convert Step-Audio-AQAA Step-Audio-AQAA-int4 --weights int4 --group 128",
    "doctor": "aqaa doctor Step-Audio-Tokenizer Step-Audio-AQAA",
}
DTYPES = ("float32", "bfloat16", "float16")
SAMPLING = {"temperature": 0.3, "top_p": 0.9}  # what help says; the pipeline has its own, and a test compares them


# ---- values ---------------------------------------------------------------------------------------------------------


def near(word, known):
    """"; did you mean …?" when `word` is nearly one of `known`, else their list."""
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else f": choose one of {', '.join(known)}"


def _number(kind, least, most, words, also=()):
    """A converter for argparse: `kind` (int or float) from least to most, or one of `also`; `words` describe it."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (least <= value <= most or value in also):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return convert


_seed = _number(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")
_count = _number(int, 1, 10**9, "a whole number, 1 or more")
_workers = _number(int, 1, 1024, "a whole number from 1 to 1024")
_temperature = _number(float, 1e-4, 100, "0 or a number from 0.0001 to 100", also=(0,))
_share = _number(float, 1e-9, 1, "a number above 0, and 1 at most")
_minutes = _number(float, 1e-3, 1e6, "a number of minutes above 0")


def _one_of(known):
    def convert(text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"there is no {text!r}{near(text, known)}")
        return text

    return convert


def _name(text):
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


# ---- the parser -----------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Arguments -> Namespace with `verb`. Raises SystemExit: 0 after help and version, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, verbs = _parsers()
    if not argv or argv[0] == "help":
        verbs.get(argv[1] if argv[1:] else "", parser).print_help()
        raise SystemExit(0 if argv else 2)
    if not argv[0].startswith("-") and argv[0] not in verbs:
        hint = f": did you mean aqaa ask {argv[0]}?" if os.path.isfile(argv[0]) else near(argv[0], list(verbs))
        parser.error(f"there is no command {argv[0]!r}{hint}")
    if argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        parser.error(f"there is no option {argv[0]!r} in front of a command: aqaa --help lists all")
    args, left = parser.parse_known_args(argv)
    if unknown := [word for word in left if word.startswith("-") and word != "-"]:
        known = sorted(set(re.findall(r"--[a-z][\w-]*", verbs[args.verb].format_help())))
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"aqaa {args.verb} --help lists all"
        verbs[args.verb].error(f"there is no option {unknown[0]!r}: {hint}")
    if left and not hasattr(args, "questions"):
        verbs[args.verb].error(f"there is one word too many, {left[0]!r}")
    if left:  # a question behind an option, as in `aqaa ask a.wav --json b.wav`
        args.questions += left
    return args


def _parsers():
    """(the parser, {verb: its own parser})."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="aqaa", description="A spoken question goes in, a spoken answer comes out.", formatter_class=raw,
        usage="aqaa COMMAND ...", epilog="`aqaa COMMAND --help` lists options. For a start:\n  " + EXAMPLES["ask"],
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"aqaa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="verb", prog="aqaa", required=True)
    verbs = {}

    def verb(name, words, usage, *parents):
        verbs[name] = commands.add_parser(
            name, help=words, description=words[0].upper() + words[1:] + ".", parents=parents, formatter_class=raw,
            usage=f"aqaa {name} {usage}".rstrip() + " [options]", epilog=f"example:\n  {EXAMPLES[name]}",
        )  # fmt: skip
        return verbs[name]

    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", default="cpu", type=_name, help="cpu, cuda, cuda:1 ... (%(default)s)")
    seed = argparse.ArgumentParser(add_help=False)
    seed.add_argument("--seed", type=_seed, default=0, metavar="N", help="same seed, same result (%(default)s)")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")
    workers = argparse.ArgumentParser(add_help=False)
    cores = os.cpu_count()
    workers.add_argument("--workers", type=_workers, default=cores, metavar="N", help="processes (%(default)s)")

    sampling = argparse.ArgumentParser(add_help=False, parents=[where, seed, as_json])
    sampling.add_argument("--preset", default="mini", type=_name, metavar="NAME",
                          help="mini, a folder with weights, or full (%(default)s)")  # fmt: skip
    for role, what in RELEASED.items():
        sampling.add_argument(f"--{role}", metavar="FOLDER", type=_name, help=f"{what}, in place of the preset's")
    sampling.add_argument("--speaker", metavar="WAV", help="a recording whose voice the released vocoder takes")
    sampling.add_argument("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}: of backbone and flow")
    sampling.add_argument("--engine", metavar="URL", help="a vLLM server that generates, or fast: our GPU kernels")
    sampling.add_argument("--amx", action="store_true", help="tokenizers and flow on the matrix units of a Xeon")
    sampling.add_argument(
        "--temperature", type=_temperature, metavar="T", help=f"0: the likeliest token ({SAMPLING['temperature']})"
    )
    sampling.add_argument(
        "--top-p", type=_share, metavar="P", help=f"sample among tokens of this total ({SAMPLING['top_p']})"
    )

    ask = verb("ask", "answer spoken questions", "QUESTION [QUESTION ...]", sampling)
    ask.add_argument("questions", nargs="+", metavar="QUESTION", help="a sound file: wav, flac, ogg, mp3; - is stdin")
    ask.add_argument("-o", "--output", type=_name, metavar="OUT",
                     help="a wav (answer.wav), of several a folder (answers)")  # fmt: skip
    ask.add_argument("--stream", action="store_true", help="show the words while the answer is being made")

    chat = verb("chat", "several turns, each question a file", "[QUESTION ...]", sampling)
    chat.add_argument("questions", nargs="*", metavar="QUESTION", help="sound files; without any, names on stdin")
    chat.add_argument("-o", "--output", type=_name, metavar="OUT", help="folder of the answers (answers)")
    chat.set_defaults(stream=False)

    listen = verb("listen", "show every token between question and answer", "QUESTION", sampling)
    listen.add_argument("question", metavar="QUESTION", help="a sound file; - is stdin")

    train = verb("train", "train a part of the mini, or all of it", "STAGE", where, seed, workers)
    train.add_argument("stage", type=_one_of(stages.names()), metavar="STAGE", help="one of those below, or all")
    train.epilog = f"stages, in the order of all:\n{stages.described()}\n\n{train.epilog}"
    train.add_argument("--out", default="work/mini", type=_name, help="folder of the run (%(default)s)")
    train.add_argument("--corpus", default="work/corpus", type=_name, help="folder of the spoken corpus (%(default)s)")
    train.add_argument("--export", default="data/mini", type=_name, help="folder of the finished model (%(default)s)")
    train.add_argument("--init", metavar="FOLDER", type=_name, help="model folder to start from, such as data/mini")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--steps", type=_count, metavar="N", help="in place of the stage's own number")
    train.add_argument("--minutes", type=_minutes, metavar="M", help="end each stage, schedule included, after so many")
    train.add_argument("--scale", type=_share, default=1.0, metavar="S", help="share of corpus and steps (%(default)s)")

    bench = verb("bench", f"measure one of {', '.join(BENCHES)}", "[WHAT]", where, seed, workers, as_json)
    bench.add_argument("what", nargs="?", default="speed", type=_one_of(tuple(BENCHES)), metavar="WHAT",
                       help="one of these (%(default)s)")  # fmt: skip
    bench.add_argument("--preset", default="mini", type=_name, metavar="NAME", help="as of ask (%(default)s)")
    bench.add_argument("--corpus", default="work/corpus", help="accuracy: folder of evaluation questions (%(default)s)")
    bench.add_argument("--busy", action="store_true", help="speed: also beside an endless loop on every core")
    bench.add_argument("--limit", type=_count, metavar="N", help="how many questions of each cell")
    bench.add_argument("--layers", type=_count, metavar="N", help="scale: so many layers of those of --preset full")
    bench.add_argument("--only", type=_one_of(("linguistic", "semantic", "flow", "hift", "backbone")), metavar="PART",
                       help="parts: linguistic, semantic, flow, hift or backbone alone")  # fmt: skip
    bench.add_argument("--text-only", action="store_true", help="accuracy: leave the sound and its judge out")
    bench.add_argument("--out", metavar="FILE", type=_name, help="also write the numbers to this JSON file")

    plan = verb("plan", "what a language model needs on given GPUs, and how fast it will talk", "[MODEL]", as_json)
    plan.add_argument("model", nargs="?", default="130b", metavar="MODEL",
                      help="130b, 3b, mini or a folder (%(default)s)")  # fmt: skip
    plan.add_argument("--gpus", action="append", default=[], metavar="4xH100-80",
                      help="again for more rows (usual ones)")  # fmt: skip
    plan.add_argument("--weights", type=_one_of(("bf16", "fp8", "int8", "int4")), metavar="FORMAT",
                      help="bf16, fp8, int8 or int4 (all of them)")  # fmt: skip
    plan.add_argument("--group", type=_count, metavar="N", help="inputs that share a scale in int4: 128, 64, 32")
    plan.add_argument("--context", type=_count, default=2048, metavar="IDS", help="ids of the dialogue (%(default)s)")

    convert = verb("convert", "quantise a language model, a layer at a time", "SOURCE OUT", where, as_json)
    convert.add_argument("source", metavar="SOURCE", help="mini, a folder like it, or a released language model")
    convert.add_argument("out", type=_name, metavar="OUT", help="folder of the result; goes on where it stopped")
    convert.add_argument("--weights", type=_one_of(("int4", "int8", "fp8")), default="int4", metavar="FORMAT",
                         help="int4, int8 or fp8 (%(default)s)")  # fmt: skip
    convert.add_argument("--group", type=_count, metavar="N",
                         help="inputs that share a scale in int4 (the most that fit)")  # fmt: skip
    convert.add_argument("--method", type=_one_of(("rtn", "gptq")), default="rtn", metavar="NAME",
                         help="rtn rounds each weight by itself; gptq (%(default)s)")  # fmt: skip
    convert.add_argument("--calibration", metavar="FILE", help="gptq: JSON, a list of dialogues, each a list of ids")

    doctor = verb("doctor", "versions, devices, speech engines, weights; what a folder holds", "[FOLDER ...]", as_json)
    doctor.add_argument("folders", nargs="*", metavar="FOLDER", help="released folders, or ones like the mini")
    doctor.add_argument("--preset", default="mini", type=_name, metavar="NAME", help="whose weights (%(default)s)")
    return parser, verbs


# ---- what can be known without loading anything ---------------------------------------------------------------------


def fault_of_question(name):
    """One sentence on what is wrong with a question, as far as its name and its kind of file tell; None if nothing."""
    if name == "-":
        waits = sys.stdin is None or sys.stdin.isatty()
        return "stdin is a terminal: send a sound to it, as in `aqaa ask - < question.wav`." if waits else None
    try:
        state = os.stat(name)
    except (OSError, ValueError) as fault:
        return f"{name or repr(name)} {_why(fault)}"
    kind = state.st_mode
    if stat.S_ISDIR(kind):
        return f"{name} is a folder: name a sound file in it."
    if stat.S_ISFIFO(kind) and os.path.exists(os.path.realpath(name)):  # not `<(command)`, which has been opened
        return f"{name} is a named pipe, which may never be written to: use `aqaa ask - < {name}`."
    if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
        return f"{name} is a device or a socket: name a sound file."
    if stat.S_ISREG(kind) and not state.st_size:
        return f"{name} is empty: record or copy it again."
    if not os.access(name, os.R_OK):
        return f"{name} cannot be read (Permission denied): check its permissions."
    return None


def _why(fault):
    code = getattr(fault, "errno", None)
    if code == errno.ELOOP:
        return "is a loop of links: name the file itself."
    if code == errno.ENAMETOOLONG:
        return "is a name longer than any file can have: check the name."
    if code in (errno.ENOENT, errno.ENOTDIR):
        return "does not exist: check the name."
    return f"cannot be read ({getattr(fault, 'strerror', None) or fault}): check its name and permissions."


def check_model(args):
    """The options that choose weights, engine and device, before any of them is loaded. Raises ValueError."""
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ValueError(f"weights cannot be {args.dtype!r}: choose float32, bfloat16 or float16.")
    check_device(args.device)
    if args.amx and not args.device.startswith("cpu"):
        raise ValueError(f"amx is a part of processors, and the device is {args.device}: leave one of them out.")
    named = {role: getattr(args, role) for role in RELEASED}
    if args.preset == "full":
        named = {role: folder or os.environ.get(f"AQAA_{role.upper()}") for role, folder in named.items()}
        if lost := [role for role, folder in named.items() if not folder]:
            choices = " and ".join(f"--{role}" for role in lost), " and ".join(f"$AQAA_{role.upper()}" for role in lost)
            raise ValueError(
                f"preset 'full' is made of released folders, and {choices[0]} names none: add it, or set {choices[1]}."
            )
    elif not all(named.values()):
        check_preset(args.preset)
    for role, folder in named.items():
        if folder:
            _check_released(role, folder)
    if args.speaker is not None and not named["vocoder"]:
        raise ValueError("a speaker's voice needs a released vocoder: name its folder with --vocoder.")
    if args.speaker is not None and (fault := fault_of_question(args.speaker)):
        raise ValueError(fault)
    if args.engine not in (None, "fast"):
        _check_address(args.engine)


def _check_address(url):
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ValueError(f"{url!r} is no address of a server: write it as http://127.0.0.1:8000, or write fast.")


def check_device(name):
    """Raises ValueError for a device that torch has no name for, and for a GPU where there is no driver."""
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,3})?", name):
        raise ValueError(f"device {name!r} is not usable here: try --device cpu.")
    if name.startswith("cuda") and sys.platform == "linux" and not os.path.exists("/dev/kfd"):  # kfd: a GPU by AMD
        import ctypes

        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise ValueError(f"device {name!r} is not usable here, it has no GPU driver: try --device cpu.") from None


def check_preset(name):
    """Raises ValueError unless it is mini or a folder."""
    if name == "full":
        raise ValueError("no weights are shipped for preset 'full': use mini, or name the released folders.")
    if name != "mini" and not os.path.isdir(name):
        raise ValueError(f"unknown preset {name!r}: use mini, or name a folder with config.json and weights.")
    if name != "mini" and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{os.path.join(name, 'config.json')} is missing: name a folder like data/mini.")


def _check_released(role, folder):
    from aqaa.doctor import roles

    if not os.path.isdir(folder):
        raise ValueError(f"no folder at {folder}: --{role} names the folder that holds the released files.")
    places = [Path(folder), *Path(folder).iterdir()]  # Step-Audio-TTS-3B has its vocoders in folders
    if not any(role in roles(place) for place in places if place.is_dir()):
        raise ValueError(f"{folder} holds nothing of {RELEASED[role]}: name its folder with --{role}.")


def check_train(args):
    """The folders of `aqaa train`. Raises ValueError."""
    check_device(args.device)
    if args.init and not os.path.isdir(args.init):
        raise ValueError(f"no folder at {args.init}: --init names a model folder, such as data/mini.")
    for name in ("out", "corpus", "export"):
        check_folder(getattr(args, name), f"--{name}")


def check_bench(args):
    """The options of `aqaa bench`. Raises ValueError."""
    check_device(args.device)
    if args.what not in ("parts", "scale"):  # these have their own presets
        check_preset(args.preset)
    if args.out:
        parent = os.path.dirname(os.path.realpath(args.out))
        if os.path.isdir(args.out):
            raise ValueError(f"--out {args.out} is a folder: name a file.")
        if not os.path.isdir(parent):
            raise ValueError(f"--out {args.out} cannot be written, its folder does not exist: make it first.")


def check_convert(args):
    """The places of `aqaa convert`. Raises ValueError."""
    check_device(args.device)
    check_preset(args.source)
    check_folder(args.out, "OUT")
    if args.calibration and (fault := fault_of_question(args.calibration)):
        raise ValueError(fault)


def check_folder(path, option):
    """Raises ValueError unless `path` is a folder or can be made one."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ValueError(f"{option} {path} cannot be a folder, {place} is a file: name another.")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written, {place} does not allow it: name another.")
