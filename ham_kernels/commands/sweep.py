"""`ham sweep`: an experiment run by run, each in a process of its own, so that a failed one takes no other along."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from .. import report
from ..common.processes import alone, launched
from ..distributed import PATIENT, Ranks, start
from ..evaluation import autoattack
from ..evaluation.named_attacks import plans
from ..methods.pgd_at import PGDAT
from ..methods.registry import warm_up_of
from ..report.strength import CLEAN, strongest
from ..runs.folder import RunFolder
from ..runs.judge_settings import EvaluateSettings
from ..runs.settings import TrainSettings
from .experiments import STRONG, Cell, planned, without_idle_teacher
from .first_weights import with_their_normalisation
from .from_settings import device_of, model_of
from .options import Sweep
from .progress import duration, say
from .run_images import images_of
from .signals import StopRequest
from .teacher import with_its_digest

ATTACKS = ("clean", "pgd20", "cw20")  # unless others are asked for
WARM_UPS = "warm-ups"  # one level deeper than the runs, so that reports of the folder leave them out


def sweep(wanted: Sweep) -> int:
    """Trains and judges what is missing of an experiment, then writes its report.

    Finished runs are kept, stopped ones go on, failed ones are tried again. Runs of one seed with the same warm-up
    share it: it is trained once, and its time counts in each. sweep.json holds how all runs of the folder ended.
    Under torchrun each process takes some of the runs, and trains each by itself, on a GPU of its own.
    Returns: 0, or 1 where a run failed. Raises: Stopped after a signal; and, before anything is trained, ValueError,
        FileNotFoundError, FileExistsError, ImportError naming what would fail in every run.
    """
    ranks = start("gloo", PATIENT)  # others may have runs of days left
    without_idle_teacher(wanted.settings).check()
    wanted = replace(wanted, settings=with_its_digest(with_their_normalisation(wanted.settings)))
    folder = wanted.out or Path("runs") / f"sweep-{wanted.settings.data.source}"
    RunFolder(folder).check_no_run()
    plan, left_out = planned(wanted.experiment, wanted.settings, wanted.seeds, wanted.only)
    for cell in plan:
        cell.settings.check()
        _check_unchanged(folder / cell.name, cell.settings)
        if _starts_behind_pgd_at(cell.settings):
            _check_unchanged(_warm_up_folder(folder, cell.settings), _warm_up_settings(cell.settings))
    _outcome(folder)
    wanted, judged = _judged_by(wanted)
    with ranks.first_alone("the look at what all runs share"):
        _check_for_all(wanted)
    if not plan:
        raise ValueError(f"only: leaves no run of {wanted.experiment}; {'; '.join(map(': '.join, left_out.items()))}")
    say(f"{folder}: {wanted.experiment}, {len(plan)} runs")
    say(judged)
    for name, why in left_out.items():
        say(f"left out: {name}: {why}")
    failed = 0
    with StopRequest("the process at hand") as stop:
        worker = _Worker(folder, wanted, stop)
        mine = _share(plan, folder, wanted, ranks)
        for i, cell in enumerate(plan, 1):
            if cell not in mine:
                continue
            stop.check()
            say(f"[{i}/{len(plan)}] {cell.name} ...")
            since = time.monotonic()
            problem = worker.bring_to_end(cell)
            took = duration(time.monotonic() - since)
            _note(folder, wanted.experiment, cell.name, problem)
            say(f"[{i}/{len(plan)}] {cell.name}: {problem or _summary(folder / cell.name, wanted.attacks)}  ({took})")
            failed += bool(problem)
    failed = sum(ranks.gather(failed))
    if ranks.rank:
        return 1 if failed else 0
    if failed == len(plan):
        say("every run failed: there is nothing to report")
        return 1
    page = report.build([folder], folder / "report", title=f"Sweep: {wanted.settings.data.source}")
    say(f"written: {page}" + (f"; {failed} of {len(plan)} runs failed" if failed else ""))
    return 1 if failed else 0


def _share(plan: Sequence[Cell], folder: Path, wanted: Sweep, ranks: Ranks) -> list[Cell]:
    """The runs of this process. Those behind one warm-up are of one process, which trains it first."""
    kinds: dict[str, list[Cell]] = {}
    for cell in plan:
        shared = wanted.share_warmup and _starts_behind_pgd_at(cell.settings)
        kinds.setdefault(str(_warm_up_folder(folder, cell.settings)) if shared else cell.name, []).append(cell)
    return [cell for cells in list(kinds.values())[ranks.rank :: ranks.world] for cell in cells]


class _Worker:
    def __init__(self, folder: Path, wanted: Sweep, stop: StopRequest):
        self.folder, self.wanted, self.stop = folder, wanted, stop

    def bring_to_end(self, cell: Cell) -> str:
        """Trains and judges one run as far as that is not done yet. Returns what went wrong, or nothing."""
        path = self.folder / cell.name
        self._wait_until_free(path)
        try:
            if not (path / "config.toml").exists():
                self._begin(path, cell.settings)
            if RunFolder.open(path).status()["state"] != "finished":
                self._run(path, "train", "--resume", str(path), "--quiet")
            search = ["--search", self.wanted.search]
            asked = ["--masking-images", str(self.wanted.masking_images)] if self.wanted.masking else ["--no-masking"]
            # under torchrun each process has a GPU of its own already
            device = ["--device", cell.settings.run.device] if launched() == 1 else []
            how = [*search, *device, *asked, "--quiet"]
            self._run(path, "evaluate", str(path), "--attacks", *self.wanted.attacks, *how)
        except (OSError, ValueError, RuntimeError) as error:
            # A judgement that failed takes nothing from a training that is finished, nor from one of another sweep.
            run = RunFolder(path)
            if (path / "config.toml").exists() and run.status()["state"] != "finished" and not run.busy():
                run.mark_failed(str(error))
            return f"FAILED: {error}"
        return ""

    def _wait_until_free(self, path: Path) -> None:
        """A sweep that was killed leaves its run working; a second one in the same folder works on it too."""
        said = False
        while RunFolder(path).busy():
            if not said:
                say(f"{path.name}: another process works on it; waiting")
            said = True
            self.stop.check()
            time.sleep(1)

    def _begin(self, path: Path, settings: TrainSettings) -> None:
        """A new run, behind the warm-up where that can be shared; none where another sweep was faster."""
        shares = self.wanted.share_warmup and _starts_behind_pgd_at(settings)
        warm_up = self._warm_up(settings, settings.method.start_epoch - 1) if shares else None
        with _alone(self.folder):
            if (path / "config.toml").exists():
                return
            if path.exists():
                raise FileExistsError(f"out: {path} is there and holds no run; move it away")
            if warm_up is None:
                RunFolder.create(path, settings)
                return
            aside = path.with_name(f".{path.name}.begun")
            shutil.rmtree(aside, ignore_errors=True)  # of a killed process
            RunFolder.create(aside, settings)
            if (warm_up / "checkpoints").exists():
                shutil.copytree(warm_up / "checkpoints", aside / "checkpoints")
            shutil.copy(warm_up / "environment.json", aside)
            aside.replace(path)

    def _warm_up(self, settings: TrainSettings, epochs: int) -> Path:
        """The run that the others of this seed start from: the warm-up alone."""
        path = _warm_up_folder(self.folder, settings)
        self._wait_until_free(path)
        with _alone(self.folder):
            if not (path / "config.toml").exists():
                RunFolder.create(path, _warm_up_settings(settings))
        if RunFolder.open(path).status()["epoch"] < epochs:
            self._run(path, "train", "--resume", str(path), "--until-epoch", str(epochs), "--quiet")
        if (done := RunFolder.open(path).status()["epoch"]) != epochs:
            raise RuntimeError(f"{path} is at epoch {done}, the runs need it at {epochs}; remove it")
        return path

    def _run(self, path: Path, *arguments: str) -> None:
        """`ham ...`, again where another process was faster at working on this run. Raises: as `_process`."""
        while True:
            self._wait_until_free(path)
            try:
                return self._process(path, *arguments)
            except RuntimeError:
                if not RunFolder(path).busy():
                    raise

    def _process(self, path: Path, *arguments: str) -> None:
        """`ham ...` in a process; what it says goes to the run's log. Raises: RuntimeError with its last line."""
        path.mkdir(parents=True, exist_ok=True)
        with (path / "log.txt").open("a+b") as log:
            began = log.seek(0, 2)
            # In a session of its own: Ctrl-C reaches the sweep alone, which passes on one signal, not a second.
            process = subprocess.Popen(
                [sys.executable, "-m", "ham_kernels", *arguments], stdout=log, stderr=log, start_new_session=True,
                env=alone(),
            )  # fmt: skip
            try:
                code = self._wait(process)
            except BaseException:
                process.kill()
                process.wait()
                raise
            log.seek(began)
            said = log.read().decode(errors="replace").strip().splitlines()
        self.stop.check()
        if code:
            raise RuntimeError(f"`ham {arguments[0]}` ended with {code}: {said[-1] if said else 'it said nothing'}")

    def _wait(self, process: subprocess.Popen) -> int:
        """Its exit status; a signal to the sweep is passed on, and waited for."""
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if self.stop.number is not None:
                    process.terminate()
                    return process.wait()


def _starts_behind_pgd_at(settings: TrainSettings) -> bool:
    """Whether a run's first epochs, but not all, are those that PGD-AT's training would begin with.

    Not where a method starts at once, or is its own warm-up with another loss or schedule: it trains all its epochs.
    """
    if settings.method.needs_teacher:  # its checkpoints tell which
        return False
    method, shared = settings.method, _warm_up_settings(settings).method
    own, others = (warm_up_of(m, settings.warm_up.name).in_effect() for m in (method, shared))
    alike = own | {"start_epoch": 1} == others | {"start_epoch": 1}
    return 1 < method.start_epoch <= settings.optim.epochs and alike


def _warm_up_folder(folder: Path, settings: TrainSettings) -> Path:
    kind = settings.warm_up
    words = [] if kind.name == "pgd_at" else [kind.name]
    if kind.natural_epochs:
        words.append(f"natural{kind.natural_epochs}")
    return folder / WARM_UPS / "-".join([*words, f"seed{settings.run.seed}"])


def _warm_up_settings(settings: TrainSettings) -> TrainSettings:
    """What all methods share before start_epoch."""
    return replace(settings, method=PGDAT(start_epoch=settings.method.start_epoch))


def _check_unchanged(path: Path, settings: TrainSettings) -> None:
    if not (path / "config.toml").exists():
        return
    begun = RunFolder.open(path).settings()
    alike = begun.method.in_effect() == settings.method.in_effect()  # what has no effect may differ
    if not alike or replace(begun, method=settings.method) != settings:
        raise ValueError(f"out: {path} was begun with other settings; give another --out, or remove it")


def _judged_by(wanted: Sweep) -> tuple[Sweep, str]:
    """With its attacks where none are given, and what to say of them."""
    if wanted.attacks:
        return wanted, f"judged by {', '.join(wanted.attacks)}"
    attacks, more = ATTACKS, ""
    if wanted.experiment in STRONG:
        try:
            autoattack.library()
            attacks = (*ATTACKS, "autoattack")
        except ImportError as error:
            more = f"; AutoAttack, which is stronger, is left out: {str(error).removeprefix('attacks: ')}"
    return replace(wanted, attacks=attacks), f"judged by {', '.join(attacks)}{more}"


def _check_for_all(wanted: Sweep) -> None:
    """What would end every run alike: the attacks, the device, the images (downloaded here, once), the model."""
    settings = wanted.settings
    EvaluateSettings(attacks=wanted.attacks, masking_images=wanted.masking_images).check()
    attack = settings.attack
    plans(wanted.attacks, eps=attack.eps, step_size=attack.step_size, norm=attack.norm)
    device_of(settings.run.device)
    images = images_of(settings)
    model_of(settings, len(images.classes), images.channels)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Inside, no other process of this sweep, nor another sweep of the folder, begins a run or notes how one ended."""
    folder.mkdir(parents=True, exist_ok=True)
    return RunFolder(folder).alone(".sweep.lock", patience=math.inf)


def _outcome(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """How the runs of the folder ended so far, and what went wrong: {name: state}, {name: problem}."""
    path = folder / "sweep.json"
    if not path.exists():
        return {}, {}
    try:
        noted = json.loads(path.read_text())
        return dict(noted["runs"]), {f["run"]: f["problem"] for f in noted["failed"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"out: {path} cannot be read ({type(error).__name__}: {error}); move it away") from error


def _note(folder: Path, experiment: str, name: str, problem: str) -> None:
    """One more run in sweep.json, at once: a run that failed before it had a folder is named nowhere else."""
    with _alone(folder):
        runs, problems = _outcome(folder)
        runs[name] = "failed" if problem else "finished"
        problems.pop(name, None)
        if problem:
            problems[name] = problem
        failed = [{"run": run, "problem": why} for run, why in problems.items()]
        RunFolder(folder).write_json("sweep.json", {"experiment": experiment, "runs": runs, "failed": failed})


def _summary(path: Path, attacks: Sequence[str]) -> str:
    """Worst class and average under the strongest attack that all runs of the sweep are judged by."""
    kind = RunFolder.open(path).usual_weights()
    name = strongest([attacks]) or CLEAN
    found = json.loads((path / "evaluation" / f"{kind}.json").read_text())["attacks"][name]
    return f"{name} {100 * found['accuracy']['value']:.1f} %, worst class {100 * found['worst_class']['value']:.1f} %"
