"""The command line: `python -m ham_kernels COMMAND`, or `ham COMMAND`.

Nothing here imports torch before the flags are read, so that help and typing errors are answered at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable

from ..common import field_types
from ..common.processes import launched, refuse_several, speaks
from ..common.provenance import package_version

USAGE = """usage: ham COMMAND [options]        (ham COMMAND --help shows the options)

  train      train a classifier into a run folder, by HAM or another method; --resume RUN goes on with one
  evaluate   judge a run, or any model (--model): accuracy per class under attacks, gradient masking
  report     one HTML page, figures and tables from any number of runs
  sweep      the paper's experiments and ablations, one command each
  export     a run's model for torch alone (torch.export, state_dict, ONNX), with a model card
  predict    classes of image files, by a run or an export
  doctor     which backend each op uses on this machine, and why
  build      compile the libraries of a checkout in place (CUDA, CPU), and show what the compilers say
"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 for what doctor or sweep found wrong; 2 for bad input; 128 + signal when stopped.

    Bad input is told in one line; with HAM_TRACEBACK=1 in the environment, with the whole way to it.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without a λ gets a ?, rather than nothing at all
        sys.stdout.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"ham_kernels {package_version()}")
        return 0
    warnings.formatwarning = _one_line
    if command not in _COMMANDS:
        print(f"ham: no command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    if not speaks():
        warnings.simplefilter("ignore")  # the first process says what all of them would
    try:
        if command not in ("doctor", "build", *_SHARED):
            refuse_several()
        status = _COMMANDS[command](rest)
        if command in _SHARED and launched() > 1:
            from ..distributed import stop

            stop()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)  # torch's threads may abort a process that unloads them, and torchrun then all others
        return status
    except KeyboardInterrupt:
        print(f"ham {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ham ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError) and type(error).__name__ != "EngineError"
        ):  # of torch, say, or a fault of ours
            raise
        if os.environ.get("HAM_TRACEBACK"):
            raise
        print(f"ham {command}: {error}", file=sys.stderr)
        return 2


def _one_line(message, category, *_) -> str:
    """A warning as its user needs it: without the line of source that gave it."""
    return f"{category.__name__}: {message}\n"


def _train(argv: list[str]) -> int:
    from . import flags

    wanted = flags.parse_train(argv)
    if isinstance(wanted, flags.Train):
        wanted.settings.check()
    from . import train
    from .signals import Stopped

    try:
        if isinstance(wanted, flags.Resume):
            train.resume(wanted.resume, path=wanted.path, until_epoch=wanted.until_epoch, quiet=wanted.quiet)
        elif wanted.dry_run:
            from .dry_run import dry_run

            refuse_several()
            dry_run(wanted.settings, wanted.out)
        else:
            train.train(wanted.settings, wanted.out, quiet=wanted.quiet)
    except Stopped as error:
        out = shlex.quote(str(error.run))
        if speaks():
            print(f"ham train: {error}; go on with `ham train --resume {out}`", file=sys.stderr)
        return error.code
    return 0


def _evaluate(argv: list[str]) -> int:
    from . import flags

    wanted = flags.parse_evaluate(argv)
    if isinstance(wanted, flags.Adoption):
        from . import adopt

        refuse_several()
        adopt.adopt_as(wanted, quiet=wanted.quiet)
        return 0
    wanted.settings.check()
    from . import evaluate

    evaluate.evaluate_run(wanted.run, wanted.settings, quiet=wanted.quiet)
    return 0


def _report(argv: list[str]) -> int:
    from . import flags

    wanted = flags.parse_report(argv)
    from .. import report

    told = dict(vars(wanted))
    page = report.build(told.pop("runs"), told.pop("out"), **told)
    print(f"written: {page}, with its figures and tables beside it")
    data = json.loads((page.parent / "data.json").read_text(encoding="utf-8"))
    held = [(section["title"], one) for section in data["sections"] for one in section["audit"]]
    for title, one in held:
        where = f"{title}, {one['group']}" if len(data["sections"]) > 1 else one["group"]
        print(f"{'pass' if one['passes'] else 'FAIL'}  {where}: {one['requirement']}, {one['measured']}")
    return 0 if all(one["passes"] for _, one in held) else 1


def _sweep(argv: list[str]) -> int:
    from . import flags
    from .experiments import without_idle_teacher

    wanted = flags.parse_sweep(argv)
    without_idle_teacher(wanted.settings).check()
    from .signals import Stopped
    from .sweep import sweep

    try:
        return sweep(wanted)
    except Stopped as error:
        if speaks():
            print(f"ham sweep: {error}; the same command goes on", file=sys.stderr)
        return error.code


def _export(argv: list[str]) -> int:
    from . import flags

    wanted = flags.parse_export(argv)
    from .export import export

    print(f"written: {export(wanted)}")
    return 0


def _predict(argv: list[str]) -> int:
    from . import flags

    wanted = flags.parse_predict(argv)
    field_types.check(wanted)
    from .predict import predict

    predict(wanted)
    return 0


def _doctor(argv: list[str]) -> int:
    from . import doctor

    return doctor.main(argv)


def _build(argv: list[str]) -> int:
    from ..ops.native import build

    return build.main(argv)


_SHARED = ("train", "evaluate", "sweep")  # that several processes of torchrun do together

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
    "sweep": _sweep,
    "export": _export,
    "predict": _predict,
    "doctor": _doctor,
    "build": _build,
}
