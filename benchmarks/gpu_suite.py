"""All that has to be proved on a GPU, in slots of some minutes, each going on where the last one ended.

    python benchmarks/gpu_suite.py --out DIR                            tests, sanitizers, benchmarks, CIFAR-10 runs
    python benchmarks/gpu_suite.py --out DIR --stage train              only stages whose names begin so
    python benchmarks/gpu_suite.py --smoke --out DIR                    every stage on a CPU, with tiny sizes
    python benchmarks/gpu_suite.py --write-docs                         docs/gpu-results.md from results/gpu/

Each stage leaves DIR/stages/NAME.json, and is skipped where that is there. One that ends badly is noted and tried again
with --retry or --stage only; one that the slot is too short for is left for the next call, as is the rest of one that
could not end. DIR/summary.md has one table of goal, measured, held or not. Needs no network with --data; what is not
installed, torchattacks and pyautoattack among it, then comes in a folder of `pip install --target`, by PYTHONPATH. Exit
status: 0 when all stages are done, 1 where one failed, 3 where some are left for the next call, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import shlex
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu import claims as gpu_claims
from gpu import runs as gpu_runs
from gpu import stages as gpu_stages
from gpu.files import collect, fabricate, restore, to_json, write
from gpu.process import Failed, OutOfTime, Shell, Slot
from gpu.stages import BENCHMARKS, ROOT, Options, Stage
from readme import argument_types as kinds

RESERVE = 30.0  # seconds at the end of a slot: a stage that has to stop, the report, the summary
RESULTS, PAGE = BENCHMARKS / "results" / "gpu", ROOT / "docs" / "gpu-results.md"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=kinds.folder, metavar="DIR", help="everything goes here")
    p.add_argument("--minutes", type=float, default=9.0, help="of this slot (default 9)")
    p.add_argument("--stage", nargs="+", default=[], metavar="NAME", help="only stages whose names begin so")
    p.add_argument("--retry", action="store_true", help="run stages that failed once more")
    p.add_argument("--again", action="store_true", help="with --stage: tests and benchmarks anew, even if done")
    p.add_argument("--data", type=kinds.there, metavar="PATH", help="CIFAR-10 as a folder or tar of class folders "
                   "(default: torchvision's, downloaded)")  # fmt: skip
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="(default 0 1)")
    p.add_argument("--arms", nargs="+", choices=gpu_runs.ALL, metavar="ARM", help=f"of {', '.join(gpu_runs.ALL)}; "
                   "in this order (default: all)")  # fmt: skip
    p.add_argument("--epochs", type=int, default=30, help="of each run (default 30)")
    p.add_argument("--engine", choices=gpu_runs.ENGINES, default="bf16", help="of training (default bf16; both bf16 "
                   "and fp32 with channels_last, compile and cuda_graphs, plain with nothing)")  # fmt: skip
    p.add_argument("--autoattack-images", type=int, default=1000, metavar="N", help="(default 1000; 0: all)")
    p.add_argument("--collect", type=kinds.folder, metavar="DIR2", help="copy results.tar.gz and the summary here")
    p.add_argument("--restore", type=kinds.there, metavar="FILE", help="begin with results.tar.gz of another machine")
    p.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: does every stage work?")
    p.add_argument("--commit", metavar="TEXT", help="of the code, for the summary (default: asks git)")
    p.add_argument("--list", action="store_true", help="print the stages and end")
    p.add_argument("--write-docs", action="store_true", help="write docs/gpu-results.md from results/gpu/summary.json")
    args = p.parse_args(arguments)
    if args.write_docs:
        if not (RESULTS / "summary.json").exists():
            p.error(f"--write-docs: {RESULTS / 'summary.json'} is not there; it is the summary.json of a call")
        return args
    if args.out is None:
        p.error("--out: give a folder")
    for name, low in (("epochs", 2), ("autoattack_images", 0)):
        if getattr(args, name) < low:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}; it must be at least {low}")
    if not args.minutes > 0:
        p.error(f"--minutes: got {args.minutes}; it must be more than 0")
    if args.again and not args.stage:
        p.error("--again: needs --stage")
    if min(args.seeds) < 0:
        p.error(f"--seeds: got {min(args.seeds)}; none may be negative")
    if args.restore is not None and not (args.restore.is_file() and tarfile.is_tarfile(args.restore)):
        p.error(f"--restore: {args.restore} is not a tar, as --collect writes it")
    known = [stage.name for stage in plan_of(Options(args.out, seeds=tuple(args.seeds), arms=args.arms))]
    if unknown := [name for name in args.stage if not any(k.startswith(name) for k in known)]:
        p.error(f"--stage: got {unknown[0]}; there are {', '.join(known)}")
    return args


def plan_of(o: Options) -> list[Stage]:
    return [*gpu_stages.stages(o), *gpu_runs.stages(o), *gpu_stages.last_stages(o)]


# ---------------------------------------------------------------- one call
class Suite:
    """Runs what is missing of a plan, in its order."""

    def __init__(
        self, o: Options, plan: Sequence[Stage], slot: Slot, *, only: Sequence[str] = (), retry: bool = False,
        again: bool = False, command: str = "", collect: Path | None = None,
    ):  # fmt: skip
        self.o, self.plan, self.slot, self.command, self.collect_to = o, plan, slot, command, collect
        self.only, self.retry, self.again = tuple(only), retry, again
        self.left: list[str] = []
        self.blocked: set[str] = set()  # what another call like this one would not bring either
        self.facts: dict = {}
        for folder in ("stages", "logs"):
            (o.out / folder).mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        for stage in self.plan:
            if why := self._why_not(stage):
                print(f"[{stage.name}] {why}", flush=True)
                continue
            self._bring_to_end(stage)
            self.summarise()
            if stage.gate and self._result(stage).get("state") != "done":
                break
        self.summarise()
        states = [self._result(stage).get("state") for stage in self.plan if self._wanted(stage)]
        return 3 if self.left else 1 if self.blocked or "failed" in states else 0

    def _wanted(self, stage: Stage) -> bool:
        return stage.always or not self.only or stage.name.startswith(self.only)

    def _why_not(self, stage: Stage) -> str | None:
        """Why a stage is not run now, or None."""
        result = self._result(stage)
        if not (self._wanted(stage) or (stage.final and any(map(self._state, stage.behind)))):
            return "not asked for"
        if self.again and not (stage.always or stage.final):
            self._forget(stage)
        elif self._is_done(stage) and not stage.always:
            return f"done already: {result['line']}"
        elif result.get("state") == "failed" and not (self.retry or self.only or stage.always or stage.final):
            return f"failed before: {result['reason']} (--retry)"
        if waits := self._waits(stage):
            return waits
        if self.slot.left(stage.final) < stage.least:
            self.left.append(stage.name)
            return f"left for the next call: it needs {stage.least:.0f} s, {max(0.0, self.slot.left()):.0f} s are left"
        if self.slot.left(stage.final) <= 0:
            self.left.append(stage.name)
            return "left for the next call"
        return None

    def _waits(self, stage: Stage) -> str | None:
        """For which other stage, or None. Where that is not left for the next call, this one is blocked."""
        missing, enough = [name for name in stage.after if self._state(name) != "done"], all
        if stage.behind and not (missing or any(map(self._state, stage.behind))):
            missing, enough = list(stage.behind), any
        if not missing:
            return None
        if enough(name in self.left for name in missing):
            self.left.append(stage.name)
            return f"waits for {missing[0]}"
        self.blocked.add(stage.name)
        return f"waits for {missing[0]}, which {self._state(missing[0]) or 'does not run in this call'}"

    def _bring_to_end(self, stage: Stage) -> None:
        started, began = _now(), time.monotonic()
        log = self.o.out / "logs" / f"{stage.name}.log"
        stamp = stage.stamp() if stage.stamp else None
        shell = Shell(self.slot, log, _environment(self.o), self.o.out, stage.limit, stage.final)
        try:
            result = {"state": "done", "reason": None, **stage.work(shell)}
        except OutOfTime:
            self.left.append(stage.name)
            print(f"[{stage.name}] the slot is over; the next call goes on with it", flush=True)
            return
        except Failed as error:
            result = {"state": "failed", "reason": str(error), "line": ""}
        except Exception as error:  # one stage's mistake must not cost the others their slot
            result = {"state": "failed", "reason": f"{type(error).__name__}: {error}", "line": ""}
        self.facts = result.get("facts", self.facts)
        seconds = time.monotonic() - began
        about = {"stage": stage.name, "started": started, "seconds": round(seconds, 1), "stamp": stamp}
        machine = self.facts.get("machine", {})
        about |= {"commit": self.facts.get("commit"), "gpu": machine.get("gpu"), "cpu": machine.get("cpu")}
        write(self._path(stage), to_json(about | result))
        print(f"[{stage.name}] {result['state']} in {seconds:.0f} s: {result['reason'] or result['line']}", flush=True)

    def _state(self, name: str) -> str | None:
        return self._result(next(stage for stage in self.plan if stage.name == name)).get("state")

    def _path(self, stage: Stage) -> Path:
        return self.o.out / "stages" / f"{stage.name}.json"

    def _result(self, stage: Stage) -> dict:
        return gpu_claims.read(self._path(stage)) or {}

    def _is_done(self, stage: Stage) -> bool:
        result = self._result(stage)
        current = stage.stamp is None or result.get("stamp") == stage.stamp()
        return result.get("state") == "done" and current

    def _forget(self, stage: Stage) -> None:
        self._path(stage).unlink(missing_ok=True)
        self.o.partial(stage.name).unlink(missing_ok=True)

    def summarise(self) -> None:
        """After every stage, so that a call that is killed has lost that stage at most."""
        summary = gpu_claims.summarise(self.o, self.plan, self.command)
        write(self.o.out / "summary.json", to_json(summary))
        write(self.o.out / "summary.md", gpu_claims.markdown(summary).encode())
        if self.collect_to is not None:
            try:
                collect(self.o.out, self.collect_to)
            except OSError as error:  # such as a full disk: what is measured is in --out, and goes on
                print(f"--collect: {error}", file=sys.stderr, flush=True)


def _environment(o: Options) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), str(BENCHMARKS)]
    paths += [str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    return env | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if o.smoke else {})


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---------------------------------------------------------------- the script
def write_docs() -> None:
    summary = json.loads((RESULTS / "summary.json").read_text())
    page = gpu_claims.markdown(summary)
    figures = [f"![{p.stem}](../{p.relative_to(ROOT)})" for p in sorted(RESULTS.glob("*.png"))]
    note = "<!-- written by benchmarks/gpu_suite.py --write-docs from benchmarks/results/gpu/summary.json -->"
    PAGE.write_text("\n\n".join([note, page.strip(), *figures]) + "\n")
    print(f"written: {PAGE}")


def main() -> int:
    args = parse()
    if args.write_docs:
        write_docs()
        return 0
    out = args.out.resolve()
    (out / "stages").mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"--out: another suite works in {out}", file=sys.stderr)
        return 2
    if args.restore is not None:
        restore(args.restore, out)
    slot = Slot(60 * args.minutes, RESERVE)
    data = fabricate(out) if args.smoke else args.data and args.data.resolve()
    small = {"seeds": (0,), "epochs": 2, "engine": "plain", "autoattack_images": 4} if args.smoke else {
        "seeds": tuple(args.seeds), "epochs": args.epochs, "engine": args.engine,
        "autoattack_images": args.autoattack_images, "commit": args.commit, "arms": args.arms,
    }  # fmt: skip
    o = Options(out, data, args.smoke, **small)
    plan = plan_of(o)
    if args.list:
        print("\n".join(stage.name for stage in plan))
        return 0
    said = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]  # a page has no use for folders
    command = f"python benchmarks/gpu_suite.py {shlex.join(said)}"
    with slot:
        suite = Suite(
            o, plan, slot, only=args.stage, retry=args.retry, again=args.again, command=command, collect=args.collect
        )
        status = suite.run()
    print(f"\n{(out / 'summary.md').read_text()}")
    if suite.left:
        print(f"left for the next call: {', '.join(dict.fromkeys(suite.left))}")
    return status


if __name__ == "__main__":
    sys.exit(main())
