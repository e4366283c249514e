"""The command line: arguments in, package calls, exit code out.

0: done, 1: could not, 2: wrong usage, 130: interrupted. Nothing heavy is imported before it is
known what to do. Each fault is one sentence on stderr."""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from aqaa import options, serve
from aqaa.files import ModelError, WriteError
from aqaa.lineage import registry
from aqaa.options import RELEASED
from aqaa.places import Places

LONGEST_DIALOGUE = 8192  # ids that the fast engine keeps room for
UNSURE = 0.5  # confidence below which the printed answer is marked


def main(argv=None):
    """Run `aqaa argv…` and return its exit code."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # names may have letters a console lacks
        if hasattr(stream, "reconfigure"):
            errors = "surrogateescape" if stream is sys.stdin else "backslashreplace"
            stream.reconfigure(errors=errors)
    try:
        args = options.parse(argv)
        code = COMMANDS[args.verb](args) or 0
    except SystemExit as end:  # argparse: --help, --version, or wrong usage
        code = end.code
    except KeyboardInterrupt:
        _complain("interrupted")
        code = 130
    except BrokenPipeError:
        code = 1
    except Exception as fault:
        code = _complain(_sentence(fault))
    return _flushed(code)


def _flushed(code):
    """The exit code, once stdout has taken everything; python does not try again at the end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except OSError as fault:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(fault, BrokenPipeError):  # the reader has gone, as in `aqaa doctor | head -1`
            return code or 1
        return _complain(f"the output cannot be written ({fault.strerror}): send it elsewhere.")


def _complain(fault):
    if sys.stderr is not None:
        print("aqaa:", " ".join(str(fault).split()), file=sys.stderr, flush=True)
    return 1


def _note(note):
    print("aqaa: note:", note, file=sys.stderr, flush=True)


def _sentence(fault, about=""):
    """One sentence on an exception; about: the question that it was raised for."""
    text = " ".join(str(fault).split())[:400]
    if isinstance(fault, ModuleNotFoundError):
        text = f"{fault.name} is not installed: pip install -e '.[test,train]' brings it"
    elif isinstance(fault, MemoryError):
        text = "there is not enough memory: close other programs, or ask less at once."
    elif isinstance(fault, WriteError):  # its sentence is whole
        text = str(fault)
    elif isinstance(fault, OSError) and fault.strerror:
        text = f"the system refuses ({fault.strerror}): check the disk and where the output goes."
        if fault.filename is not None:
            text = f"{os.fsdecode(fault.filename)} cannot be used ({fault.strerror})."
    elif not isinstance(fault, (ValueError, OSError)):  # nobody foresaw it: say where it was
        frames = traceback.extract_tb(fault.__traceback__)
        here = os.path.dirname(__file__)
        ours = [frame for frame in frames if frame.filename.startswith(here)] or frames
        place = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
        text = f"{type(fault).__name__}{place}: {text or 'no reason was given'}"
    text = text or f"{type(fault).__name__} without a reason"
    return text if about in text else f"{about}: {text}"


# ---- ask, chat ----------------------------------------------------------------------------------


def _ask(args):
    questions, chat = args.questions, args.verb == "chat"
    if questions.count("-") > 1:
        raise ValueError("stdin can be read only once: name - once.")
    faults = {question: options.fault_of_question(question) for question in questions}
    usable = [question for question in questions if not faults[question]]
    failed, respond = False, None
    with Places(args.output, usable, folder=chat or len(questions) > 1) as places:
        if usable or not questions:  # else nothing is loaded
            _check(args)
        for fault in filter(None, faults.values()):
            _complain(fault)
        for question in questions or _names_on_stdin():
            fault = faults.get(question)
            if not questions and (fault := options.fault_of_question(question)):
                _complain(fault)
            about = "" if len(questions) == 1 else question  # a single question needs no name
            if not fault:
                wav, fault = _try(about, _read, question)
            if not fault:  # only now: a bad question is told at once
                respond = respond or _responder(_load(args), args)
                done, fault = _try(about, _answer, respond, wav, places, question)
            failed |= bool(fault)
            if args.json:
                row = {"error": fault} if fault else _facts(*done, args.stream)
                print(json.dumps({"question": str(question), **row}), flush=True)
            elif not fault:  # else it is on stderr
                print(_line(question, *done), flush=True)
    return int(failed)


def _names_on_stdin():
    """Names of questions, one a line."""
    if sys.stdin is not None and sys.stdin.isatty():
        print("aqaa: names of sound files, one a line; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin or ():
        if name := line.strip():
            yield name if name != "-" else "./-"  # stdin itself is taken


def _try(about, step, *args):
    """(step(*args), None), or (None, the sentence that was printed): other questions go on. Faults
    of the weights end the run, and so does the end of the reader of our output."""
    try:
        return step(*args), None
    except (BrokenPipeError, ModelError):
        raise
    except Exception as fault:
        sentence = _sentence(fault, about)
        _complain(sentence)
        return None, sentence


def _read(question):
    from aqaa import audio

    return audio.load_question(question), audio.SAMPLE_RATE


def _answer(respond, wav, places, question):
    """(place, Answer), written."""
    place, answer = places.of(question), respond(wav)
    answer.save(place)
    places.used = True
    return place, answer


def _check(args):
    """Check the model's options before it is loaded; a useless one is told and taken away."""
    options.check_model(args)
    if args.engine == "fast" and args.device.startswith("cpu"):
        note = "--engine fast changes nothing on a CPU: its kernels need a GPU."
        _note(note)
        args.engine = None


def _load(args):
    """The model of --preset and of the released folders; its notes go to stderr. All parts are
    loaded here, so that the timings of an answer are its own."""
    from aqaa import loading

    engine = None
    if args.engine and args.engine != "fast":  # first: a server that is down is known in a moment
        from aqaa.scale.vllm.client import Server

        engine = Server(args.engine)
    names = ("device", "dtype", "amx", "speaker", *RELEASED)
    model = loading.load(args.preset, **{name: getattr(args, name) for name in names})
    if args.engine == "fast":
        from aqaa.fast.graph_decoder import Engine

        engine = Engine(model.backbone, min(LONGEST_DIALOGUE, model.config.backbone.max_seq_len))
    model.engine = engine
    for part in ("text", "linguistic", "semantic", "vocoder", *(() if engine else ("decoder",))):
        getattr(model, part)
    for note in model.notes:
        _note(note)
    return model


def _sampling(args):
    chosen = {"seed": args.seed, "temperature": args.temperature, "top_p": args.top_p}
    return {name: value for name, value in chosen.items() if value is not None}


def _responder(model, args):
    """A function from sound to Answer, as the arguments want it."""
    sampling = _sampling(args)
    if args.verb == "chat":
        return model.chat(**sampling).ask
    if args.image is not None:
        sampling["image"] = model.look(args.image)  # once for all questions
    if not args.stream:
        return lambda wav: model.ask(wav, **sampling)

    def stream(wav):
        talk = model.stream(wav, **sampling)
        # A server may be lost in mid-answer and come back; our own kernels cannot.
        lasting = hasattr(model.engine, "pieces")
        for piece in model.engine.pieces(talk, tell=_note) if lasting else talk:
            if not args.json:
                print(piece.text, end="", flush=True)
        if not args.json:
            print()
        return talk.answer

    return stream


def _facts(place, answer, streamed):
    """The row of --json."""
    return {
        "text": answer.text, "audio": str(place), "seconds": round(answer.seconds, 3),
        "first_audio_ms": round(1000 * answer.timings["first_audio"]) if streamed else None,
        "real_time_factor": round(answer.real_time_factor, 3),
        "confidence": round(answer.confidence, 4),
        "tokens": {name: len(answer.tokens[name]) for name in ("text", "linguistic", "semantic")},
    }  # fmt: skip


def _line(question, place, answer):
    doubt = "  (not sure)" if answer.confidence < UNSURE else ""
    times = f"{answer.seconds:.1f} s in {answer.timings['total']:.1f} s"
    return f"{question} -> {place}  {times}  {answer.text!r}{doubt}"


# ---- the other commands -------------------------------------------------------------------------


def _talk(args):
    from aqaa import terminal

    library = terminal.sound_library()  # before the model: without one nothing need be loaded
    _check(args)
    choices = {"detector": args.detector, "speculate": not args.no_speculation}
    terminal.talk(_load(args), library=library, **choices, **_sampling(args))


def _listen(args):
    if fault := options.fault_of_question(args.question):
        raise ValueError(fault)
    _check(args)
    wav, rate = _read(args.question)
    model = _load(args)
    from aqaa.tokenizers import interleave

    question = model.listen((wav, rate))
    answer = model.ask(question, **_sampling(args))
    linguistic, semantic = interleave.split(question, model.ids)
    phones = model.phones((wav, rate)) if model.heads else {}
    heard = {f"{name}_phones": found for name, found in phones.items()}
    rows = {
        "linguistic": linguistic, "semantic": semantic, "merged": question,
        "prompt": answer.tokens["prompt"], "answer": answer.tokens["answer"],
        "answer_linguistic": answer.tokens["linguistic"],
        "answer_semantic": answer.tokens["semantic"],
        **heard, "text": answer.text, "confidence": round(answer.confidence, 4),
        "timings": {name: round(seconds, 4) for name, seconds in answer.timings.items()},
    }  # fmt: skip
    if args.json:
        print(json.dumps({"question": args.question, "seconds": len(wav) / rate, **rows}))
        return
    print(f"{args.question}: {len(wav) / rate:.2f} s")
    for name, row in rows.items():
        if isinstance(row, list):  # of ids, or of phones with their times
            words = [str(value[0] if name in heard else value) for value in row]
            row, name = " ".join(words), f"{name} ({len(row)})"
        print(f"{name}: {row}")


def _rest(args, *own):
    """The arguments by name, without the command and those named."""
    return {name: value for name, value in vars(args).items() if name not in ("verb", *own)}


# Options of `aqaa train full` alone.
LARGE = "model data objective adapt ranks rows length lr beta".split()


def _train(args):
    options.check_train(args)
    if args.parents:
        from aqaa.training import merging

        weights = args.weights or [1.0] * len(args.parents)
        return merging.merge_folders(args.parents, weights, args.export, args.method)
    given = _rest(args, "stage", "what", "seeds", "questions", "parents", "weights", "method")
    large = {name: given.pop(name) for name in LARGE}
    if args.stage == "full":
        from aqaa.training import sharded

        out = args.out if args.out != "work/mini" else "work/full"
        return sharded.main(**large, out=out, steps=args.steps or 100, resume=args.resume,
                            device=args.device, seed=args.seed)  # fmt: skip
    if args.stage == "ablation":
        from aqaa.training import ablations

        ablations.main(args.what, seeds=args.seeds, questions=args.questions, **given)
        return 0
    if args.stage == "lineage":
        from aqaa.training.lineage import table

        out = args.out if args.out != "work/mini" else "work/lineage"
        return table.main(args.what, **{**given, "out": out})
    from aqaa.training import run

    return run.main(args.stage, **given)


def _bench(args):
    options.check_bench(args)
    from aqaa.evaluation import bench

    return bench.main(args.what, as_json=args.json, **_rest(args, "what", "json"))


def _eval(args):
    if args.systems:
        return print("\n".join(registry.SYSTEMS))
    if args.mos or args.mos_results:
        from aqaa.evaluation import mos_form

        return mos_form.main(args.mos, args.mos_results, args.report, args.limit, args.json)
    from aqaa.evaluation import stepeval

    told = {name: getattr(args, name) for name in ("judge", "out", "device")}
    told["as_json"] = args.json
    if args.compare:
        return stepeval.compare_runs(args.compare, **told)
    _check(args)
    return stepeval.main(
        args.system, lambda: _load(args), set_name=args.set, limit=args.limit, report=args.report,
        resume=args.resume, noise=args.noise, audit=args.audit, seed=args.seed,
        lineage=args.lineage, **told,
    )  # fmt: skip


def _serve(args):
    app = serve.ready(args.host, args.token)
    _check(args)
    taken = app.bound(args.host, args.port)  # before the model is loaded
    app.main(_load(args), args.host, taken, args.token, **_sampling(args))


def _plan(args):
    if args.serve:
        from aqaa.scale.vllm import launch

        return launch.main(args)
    from aqaa.scale import plan_table

    return plan_table.main(args)


def _convert(args):
    options.check_convert(args)
    from aqaa.scale import convert

    return convert.main(args)


def _doctor(args):
    from aqaa import doctor

    return doctor.main(args.folders, args.preset, args.json)


COMMANDS = {
    "ask": _ask, "chat": _ask, "talk": _talk, "listen": _listen, "train": _train, "bench": _bench,
    "eval": _eval, "serve": _serve, "plan": _plan, "convert": _convert, "doctor": _doctor,
}  # fmt: skip
