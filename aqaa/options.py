"""What can be typed after `aqaa`: the parser, and faults that arguments and file names show alone.

Nothing heavy is imported here, so that a wrong command is told at once. options.toml lists the
commands and their options."""

import argparse
import difflib
import errno
import os
import re
import stat
import sys
import tomllib
from pathlib import Path

from aqaa import __version__
from aqaa.evaluation.bench import BENCHES
from aqaa.files import server_address
from aqaa.lineage.registry import TRAINED
from aqaa.training import stages
from aqaa.weights import sources
from aqaa.weights.sources import DTYPES, RELEASED, find

SAMPLING = {"temperature": 0.3, "top_p": 0.9}  # what help says; a test compares the pipeline's own
WORDS = {  # what options.toml leaves open
    **RELEASED, **SAMPLING, "dtypes": ", ".join(DTYPES),
    "benches": ", ".join(BENCHES), "cores": os.cpu_count(),
    "ablations": ", ".join(stages.ABLATIONS), "systems": ", ".join(TRAINED),
}  # fmt: skip
STAT_FAULTS = {  # what a fault of os.stat means for the name of a question
    errno.ENOENT: "does not exist: check the name.",
    errno.ENOTDIR: "does not exist: check the name.",
    errno.ELOOP: "is a loop of links: name the file itself.",
    errno.ENAMETOOLONG: "is a name longer than any file can have: check the name.",
}
COMMANDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
SHARED = COMMANDS.pop("shared")


# ---- values -------------------------------------------------------------------------------------


def near(word, known):
    """": did you mean …?" when `word` is nearly one of `known`, else their list."""
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else f": choose one of {', '.join(known)}"


def _number(kind, least, most, words, also=()):
    """A converter for argparse: an int or float in a range, or one of `also`; else `words`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (least <= value <= most or value in also):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return convert


def _one_of(known):
    """A converter for argparse: one of the words `known`."""

    def convert(text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"there is no {text!r}{near(text, known)}")
        return text

    return convert


def _name(text):
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _weights(text):
    parts = text.split(":")
    if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are not weights such as 5:5:1")
    return [float(part) for part in parts]


TYPES = {
    "name": _name,
    "weights": _weights,
    "stage": _one_of((*stages.names(), "ablation", "lineage", "full")),
    "what": _one_of((*stages.ABLATIONS, *TRAINED, "all")),
    "bench": _one_of(tuple(BENCHES)),
    "seed": _number(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1"),
    "count": _number(int, 1, 10**9, "a whole number, 1 or more"),
    "port": _number(int, 1, 65535, "a port from 1 to 65535"),
    "workers": _number(int, 1, 1024, "a whole number from 1 to 1024"),
    "temperature": _number(float, 1e-4, 100, "0 or a number from 0.0001 to 100", also=(0,)),
    "share": _number(float, 1e-9, 1, "a number above 0, and 1 at most"),
    "price": _number(float, 1e-6, 1e6, "a price above 0"),
    "adapt": _number(int, 0, 4096, "a whole number from 0 to 4096"),
    "rate": _number(float, 1e-9, 1, "a number above 0, and 1 at most"),
    "minutes": _number(float, 1e-3, 1e6, "a number of minutes above 0"),
}


# ---- the parser ---------------------------------------------------------------------------------


def parse(argv=None):
    """Arguments -> Namespace with `verb`. Raises SystemExit: 0 after help, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, verbs = _parsers()
    if not argv or argv[0] == "help":
        verbs.get(argv[1] if argv[1:] else "", parser).print_help()
        raise SystemExit(0 if argv else 2)
    if not argv[0].startswith("-") and argv[0] not in verbs:
        question = f": did you mean aqaa ask {argv[0]}?"
        hint = question if os.path.isfile(argv[0]) else near(argv[0], list(verbs))
        parser.error(f"there is no command {argv[0]!r}{hint}")
    if argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        fault = f"there is no option {argv[0]!r} in front of a command"
        parser.error(f"{fault}: aqaa --help lists all")
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
    """(the parser, {verb: its own parser}), as options.toml has them."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    example = COMMANDS["ask"]["example"]
    parser = argparse.ArgumentParser(
        prog="aqaa", usage="aqaa COMMAND ...",
        description="A spoken question goes in, a spoken answer comes out.",
        epilog=f"`aqaa COMMAND --help` lists options. For a start:\n  {example}", **layout,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"aqaa {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="verb", prog="aqaa", required=True
    )
    verbs = {}
    for name, command in COMMANDS.items():
        words = command["help"].format(**WORDS)
        verb = verbs[name] = commands.add_parser(
            name, usage=f"aqaa {name} {command['usage']} [options]",
            help=words, description=f"{words[0].upper()}{words[1:]}.",
            epilog=f"example:\n  {command['example']}", **layout,
        )  # fmt: skip
        for options in (*(SHARED[group] for group in command["shared"]), command["options"]):
            for flags, settings in options.items():
                verb.add_argument(*flags.split(), **_settings(**settings))
        verb.set_defaults(**command.get("defaults", {}))
    train = verbs["train"]
    train.epilog = f"stages, in the order of all:\n{stages.described()}\n\n{train.epilog}"
    return parser, verbs


def _settings(help, type=None, one_of=None, **others):
    """Arguments of add_argument from a row of options.toml."""
    convert = _one_of(one_of) if one_of else TYPES.get(type)
    others |= {"type": convert} if convert else {}
    if isinstance(others.get("default"), str):
        others["default"] = others["default"].format(**WORDS)
    return {"help": help.format(**WORDS), **others}


# ---- what can be known without loading anything --------------------------------------------------


def fault_of_question(name):
    """One sentence on the fault of a question's name or kind of file; None if there is none."""
    if name == "-":
        waits = sys.stdin is None or sys.stdin.isatty()
        remedy = "send a sound to it, as in `aqaa ask - < question.wav`"
        return f"stdin is a terminal: {remedy}." if waits else None
    try:
        state = os.stat(name)
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        other = f"cannot be read ({reason}): check its name and permissions."
        return f"{name or repr(name)} {STAT_FAULTS.get(getattr(fault, 'errno', None), other)}"
    kind = state.st_mode
    regular, pipe, fault = stat.S_ISREG(kind), stat.S_ISFIFO(kind), None
    if stat.S_ISDIR(kind):
        fault = "is a folder: name a sound file in it."
    elif pipe and os.path.exists(os.path.realpath(name)):  # not `<(command)`, already opened
        fault = f"is a named pipe, which may never be written to: use `aqaa ask - < {name}`."
    elif not regular and not pipe:
        fault = "is a device or a socket: name a sound file."
    elif regular and not state.st_size:
        fault = "is empty: record or copy it again."
    elif not os.access(name, os.R_OK):
        fault = "cannot be read (Permission denied): check its permissions."
    return fault and f"{name} {fault}"


def check_model(args):
    """The options that choose weights, engine and device, before loading. Raises ValueError."""
    check_device(args.device)
    named = {role: getattr(args, role) or None for role in RELEASED}
    named = sources.released_folders(args.preset, named)
    sources.check_choices(named, args.device, args.dtype, args.amx, args.speaker)
    if len(named) < len(RELEASED):
        check_preset(args.preset)
    for role, folder in named.items():
        if not os.path.isdir(folder):
            remedy = f"--{role} names the folder that holds the released files"
            raise ValueError(f"no folder at {folder}: {remedy}.")
        places = [Path(folder), *Path(folder).iterdir()]  # Step-Audio-TTS-3B has two vocoders
        if not any(role in sources.roles(place) for place in places if place.is_dir()):
            fault = f"{folder} holds nothing of {RELEASED[role]}"
            raise ValueError(f"{fault}: name its folder with --{role}.")
    if args.speaker is not None:
        _check_readable(args.speaker)
    if args.engine not in (None, "fast"):
        server_address(args.engine, ", or write fast")


def _check_readable(name):
    if fault := fault_of_question(name):
        raise ValueError(fault)


def check_device(name):
    """Raise ValueError for a device that torch has no name for, or a GPU without a driver."""
    fault = f"device {name!r} is not usable here"
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,3})?", name):
        raise ValueError(f"{fault}: try --device cpu.")
    amd = os.path.exists("/dev/kfd")  # torch calls its GPUs cuda as well
    if name.startswith("cuda") and sys.platform == "linux" and not amd:
        import ctypes

        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise ValueError(f"{fault}, it has no GPU driver: try --device cpu.") from None


def check_preset(name):
    """Raise ValueError unless it is mini or a folder with a configuration."""
    config = find(name) / "config.json"
    if name != "mini" and not config.is_file():
        raise ValueError(f"{config} is missing: name a folder like data/mini.")


def check_train(args):
    """The folders of `aqaa train`. Raises ValueError."""
    check_device(args.device)
    if args.init and not os.path.isdir(args.init):
        remedy = "--init names a model folder, such as data/mini"
        raise ValueError(f"no folder at {args.init}: {remedy}.")
    names = {"ablation": stages.ABLATIONS, "lineage": (*TRAINED, "all")}.get(args.stage, (None,))
    if args.what not in names:
        raise ValueError("ablations and systems of the lineage have a name, and nothing else has: "
                         "write `aqaa train ablation layouts` or `aqaa train lineage speechgpt`.")
    if args.stage == "full" and not (args.model and args.data):
        raise ValueError("train full needs a language model and what it learns from: write `aqaa "
                         "train full --model FOLDER --data FILE`.")
    if args.stage != "full" and (args.model or args.data):
        raise ValueError("--model and --data are for `aqaa train full`: leave them out.")
    if args.model and not os.path.isdir(args.model):
        raise ValueError(f"no folder at {args.model}: --model names one of a language model.")
    if args.parents and (args.stage != "merge" or args.export == "data/mini"):
        raise ValueError("--parents are merged into another folder: write `aqaa train merge "
                         "--parents A --parents B --weights 1:1 --export FOLDER`.")
    for folder in args.parents:
        if not os.path.isdir(folder):
            raise ValueError(f"no folder at {folder}: --parents names a model folder.")
    for name in ("only", "people") if args.stage not in ("corpus", "all") else ():
        if getattr(args, name):
            raise ValueError(f"--{name} is for `aqaa train corpus`: leave it out.")
    for folder in args.people:
        if not os.path.isdir(folder):
            raise ValueError(f"no folder at {folder}: --people names one with a manifest.json.")
    for name in ("out", "corpus", "export"):
        check_folder(getattr(args, name), f"--{name}")


def check_bench(args):
    """The options of `aqaa bench`. Raises ValueError."""
    check_device(args.device)
    if args.what not in ("parts", "scale"):  # these have their own presets
        check_preset(args.preset)
    check_folder(args.folder, "--folder")
    if (args.what == "people") != bool(args.target):
        raise ValueError("bench people listens to a folder, and it alone does: write `aqaa bench "
                         "people FOLDER`.")
    if args.target and not os.path.isdir(args.target):
        raise ValueError(f"no folder at {args.target}: bench people takes one of recordings.")
    if args.out and os.path.isdir(args.out):
        raise ValueError(f"--out {args.out} is a folder: name a file.")
    if args.out and not os.path.isdir(os.path.dirname(os.path.realpath(args.out))):
        fault = "cannot be written, its folder does not exist: make it first."
        raise ValueError(f"--out {args.out} {fault}")


def check_convert(args):
    """The places of `aqaa convert`. Raises ValueError."""
    check_device(args.device)
    check_preset(args.source)
    check_folder(args.out, "OUT")
    if args.calibration:
        _check_readable(args.calibration)


def check_folder(path, option):
    """Raise ValueError unless `path` is a folder or can be made one."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ValueError(f"{option} {path} cannot be a folder, {place} is a file: name another.")
    if not os.access(place, os.W_OK):
        fault = f"cannot be written, {place} does not allow it"
        raise ValueError(f"{option} {path} {fault}: name another.")
