"""Build, check and edit the notebooks: `python notebooks/build.py COMMAND [NN ...]`; without NN, all of them.

    build   run in a fresh kernel, write back in one fixed form, renew data/runs/notebooks.json and the maps
    check   run, compare the printed text with what is committed; a sentence for every drift, exit code 1
    open    write build/NN_name.py, the notebook as text (py:percent), to be edited
    close   fold build/NN_name.py back: tags are kept, the notebook is run; makes a new notebook when there is none
    html    a static site of all notebooks (--out FOLDER): opens from disk, needs no JavaScript and no network; HTML in
            cells and outputs is passed through as it stands, so only build it of notebooks that you trust
    teach   renew the map of notebooks in README.md and the table of exercises in TEACH.md
    diff    let `git diff` show notebooks as text

A notebook that raises, warns or names a place on this computer is reported and left as it was.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

CODE = Path(__file__).resolve().parent.parent  # what kernels import `aqaa` from
ROOT = CODE  # what is read and written; tests point it elsewhere
sys.path[:0] = [] if str(CODE) in sys.path else [str(CODE)]

from notebooks import form, maps, pages  # noqa: E402
from notebooks.form import Failure, read, replace, write  # noqa: E402

CELL_TIMEOUT = 600  # s; a cell that takes this long hangs
PERCENT = {"jupytext": {"cell_metadata_filter": "tags,-all", "notebook_metadata_filter": "-all"}}


# --- notebooks on disk ----------------------------------------------------------------------------------------


def notebooks(wanted=(), folder="notebooks", suffix=".ipynb"):
    """Paths of the notebooks (or their texts in build/) in order; `wanted` names some: 3, 03, 03_name, a path."""
    found = {path.stem[:2]: path for path in sorted((ROOT / folder).glob(f"[0-9][0-9]_*{suffix}"))}
    keys = [Path(name).stem.split("_")[0].zfill(2) for name in wanted]
    for name, key in zip(wanted, keys):
        if key not in found:
            raise Failure(f"no notebook {name} in {folder}/: there are {', '.join(found) or 'none'}")
    return [found[key] for key in keys] if wanted else list(found.values())


# --- running --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def environment(folder):
    """What kernels inherit: this clone first, no chance in hashes, no start-up files, threads that wait
    for each other briefly: on a busy machine long spinning costs more than it saves, on an idle one none is slow."""
    path = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    mine = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "IPYTHONDIR": str(folder), "JUPYTER_PLATFORM_DIRS": "1",
            "GOMP_SPINCOUNT": "20000"}  # fmt: skip
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run(nb, name, parameters=None):
    """Run `nb` from top to bottom in a fresh kernel and an empty folder: (normalised notebook, seconds).

    Raises Failure when a cell raises (and is not tagged raises-exception), hangs, writes to stderr, leaves a file
    behind or prints an absolute path.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError

    with tempfile.TemporaryDirectory() as folder, environment(Path(folder, "ipython")):
        done, here = Path(folder, "done.ipynb"), Path(folder, "here")
        here.mkdir()
        began = time.perf_counter()
        try:
            papermill.execute_notebook(
                form.normalise(nb), str(done), parameters or {}, kernel_name="python3", cwd=str(here),
                progress_bar=False, request_save_on_cell_execute=False, execution_timeout=CELL_TIMEOUT,
                extra_arguments=["--log-level=50"],  # kernels chat on our stderr
            )
        except papermill.exceptions.PapermillExecutionError:
            pass  # it is in `done`; an error that a cell is meant to raise ends up here too
        except RuntimeError as error:
            raise Failure(f"{name}: {str(error).strip() or 'the kernel died'}") from None
        except CellTimeoutError as error:
            line = (re.findall(r"^-{5,}\n(.*)", str(error), re.MULTILINE) or ["?"])[0]
            raise Failure(f"{name}: a cell ran longer than {CELL_TIMEOUT} s: {line}") from None
        seconds = time.perf_counter() - began
        result = read(done)
        result.cells = [cell for cell in result.cells if "papermill-error-cell-tag" not in form.tags(cell)]
        left = sorted(path.name for path in here.iterdir())
    if fault := next(form.faults(result), None) or (f"wrote {', '.join(left)} beside itself" if left else None):
        raise Failure(f"{name}: {fault}")
    return form.normalise(result), seconds


def each(paths, action):
    """Call action(path) → (seconds, KB, what to say) for every path, a line each; whether one failed."""
    failed = False
    for path in paths:
        print(f"{path.stem:28}", end=" ", flush=True)
        try:
            seconds, kilobytes, said = action(path)
            print(f"{seconds:6.1f} s {kilobytes:5.0f} KB  {said}".rstrip(), flush=True)
        except Failure as failure:
            print("failed", flush=True)
            print(failure, file=sys.stderr, flush=True)
            failed = True
    return failed


def build(paths, command, source=read):
    """Run what `source(path)` gives, write it to notebooks/, record it; whether one failed."""

    def one(path):
        nb, seconds = run(source(path), path.stem)
        target = ROOT / "notebooks" / f"{path.stem}.ipynb"
        write(target, nb)
        kilobytes = target.stat().st_size / 1024
        record(path.stem, {"seconds": round(seconds, 1), "kilobytes": round(kilobytes)}, command)
        return seconds, kilobytes, ""

    failed = each(paths, one)
    renew()
    return failed


def record(name, entry, command):
    """Merge an entry into data/runs/notebooks.json, with its date, commit and hardware."""
    import torch

    from aqaa.records import provenance

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as show.setup() does in every notebook: the hardware line counts threads
    about = provenance()
    torch.set_num_threads(threads)
    entry |= {key: about[key] for key in ("date", "commit", "hardware")}
    path = ROOT / "data" / "runs" / "notebooks.json"
    known = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.exists() else {}
    names = {path.stem for path in notebooks()}
    entries = {key: value for key, value in sorted({**known, name: entry}.items()) if key in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps({"what": "notebooks", **about, "command": command, "notebooks": entries}, indent=1) + "\n")


def renew():
    """Renew what README.md and TEACH.md say of the notebooks. Names of the files that lack the markers."""
    lacking = []
    for path, mark, text in maps.maps(ROOT, [(path, read(path)) for path in notebooks()]):
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = maps.between(old, mark, text)
        if new is None:
            lacking.append(f"{path.name} lacks <!-- {mark} --> … <!-- /{mark} -->")
        elif new != old:
            replace(path, new)
    return lacking


# --- commands -------------------------------------------------------------------------------------------------


def check(paths):
    def one(path):
        old = read(path)
        new, seconds = run(old, path.stem)
        found = list(form.drift(old, new))
        if found:
            raise Failure("\n".join(f"{path.stem}: {sentence}" for sentence in found))
        return seconds, path.stat().st_size / 1024, "no drift"

    return each(paths, one)


def as_text(nb):
    """A notebook as py:percent: cells, their tags, nothing else."""
    import jupytext

    nb = deepcopy(nb)
    nb.metadata = deepcopy(PERCENT)
    for cell in nb.cells:
        cell.pop("id", None)
    return jupytext.writes(nb, fmt="py:percent")


def open_text(paths, force=False):
    for path in paths:
        target, text = ROOT / "build" / f"{path.stem}.py", as_text(form.normalise(read(path)))
        if target.exists() and target.read_text(encoding="utf-8") != text and not force:
            raise Failure(f"build/{target.name} has changes: close it, or throw them away with --force")
        target.parent.mkdir(exist_ok=True)
        replace(target, text)
        print(f"build/{target.name}")


def close_text(wanted, command, run_it=True):
    import jupytext

    def source(path):
        return jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")

    paths = notebooks(wanted, "build", ".py")
    if not paths:
        raise Failure("nothing to close: there is no build/NN_name.py")
    if run_it:
        return build(paths, command, source)
    for path in paths:
        write(ROOT / "notebooks" / f"{path.stem}.ipynb", form.normalise(source(path)))
        print(f"notebooks/{path.stem}.ipynb (not run)")
    return False


def diff():
    options = "--opt cell_metadata_filter=tags,-all --opt notebook_metadata_filter=-all"
    command = f"{shlex.quote(sys.executable)} -m jupytext --to py:percent {options} -o -"
    try:
        for name, value in (("textconv", command), ("cachetextconv", "true")):  # jupytext takes seconds to start
            subprocess.run(["git", "config", f"diff.nb.{name}", value], cwd=ROOT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise Failure("git could not be set up: this is no clone, or git is not installed") from None
    print("git diff shows notebooks as text from now on (.gitattributes names them)")


def main(argv=None):
    """Exit code: 0 done, 1 could not (a sentence on stderr), 2 usage."""
    parser = argparse.ArgumentParser(
        prog="notebooks/build.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("build", "check", "open", "close", "html", "teach", "diff"):
        sub = commands.add_parser(name)
        if name in ("build", "check", "open", "close"):
            sub.add_argument("notebooks", nargs="*" if name in ("build", "check") else "+", metavar="NN")
    commands.choices["open"].add_argument("--force", action="store_true", help="throw away changes in build/")
    commands.choices["close"].add_argument("--no-run", action="store_true", help="only fold; the outputs are gone")
    commands.choices["html"].add_argument("--out", type=Path, help="folder of the site (default: build/site)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    command = shlex.join(["python", "notebooks/build.py", *argv])
    try:
        if args.command in ("build", "check"):
            paths = notebooks(args.notebooks)
            return int(build(paths, command) if args.command == "build" else check(paths))
        if args.command == "open":
            open_text(notebooks(args.notebooks), args.force)
        elif args.command == "close":
            return int(close_text(args.notebooks, command, not args.no_run))
        elif args.command == "html":
            print(pages.site(ROOT, [(path, read(path)) for path in notebooks()], args.out or ROOT / "build" / "site"))
        elif args.command == "teach" and (lacking := renew()):
            raise Failure("; ".join(lacking))
        elif args.command == "diff":
            diff()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: notebooks that were finished are written, the others as they were", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install -e '.[notebooks,test]'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
