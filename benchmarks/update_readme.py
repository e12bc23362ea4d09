"""Writes README's measured sections from benchmarks/results/; --check only compares.

The benchmark's table comes from bench_pgd_digits.json, the sweep's table and figure from the report that
`ham sweep ablations --seeds 0 1 2 --attacks clean pgd20 cw20` writes, copied to benchmarks/results/sweep_digits/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import _kernel_report
import _training_report
import bench_winograd
from _results import cells, markdown, verdict_lines

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = {
    "worst_class_time.png": "Worst-class accuracy against training time",
    "class_accuracy.png": "Robust accuracy of each class",
}


def bench_pgd() -> str:
    result = json.loads((RESULTS / "bench_pgd_digits.json").read_text())
    s, m = result["settings"], result["machine"]
    setup = (
        f"Digits, 1×8×8, ε {s['eps']:g}, step {s['step_size']:g}, K {s['steps']}, M {s['screen_steps']}, "
        f"λ {s['lam']:g}, {s['warmup']} warm-up epochs of {s['epochs']}, {s['seeds']} seeds, mean ± std. "
        f"Machine: {m['cpu']}, cores: {m['cores']}, GPU: {m['gpu']}; Python {m['python']}, torch {m['torch']}, "
        f"torchattacks {m['torchattacks']}; {m['date']}."
    )
    lines = [f"- {line}" for line in verdict_lines(result)]
    return "\n\n".join([setup, markdown(cells(result["table"])), "\n".join(lines)])


def machines_of(data: dict) -> str:
    """Where and when the runs of a report were made."""
    machines = sorted({run["machine"] for run in data["runs"]})
    versions = sorted({run["versions"].get("torch", "unknown") for run in data["runs"]})
    return f"{'; '.join(machines)}; torch {', '.join(versions)}; {data['made'][:10]}"


def report(name: str, said: str) -> str:
    """What a report compares, kept in benchmarks/results/: its own table, and its figure where that is kept too.

    `said` is the sentence above it; {seeds} and {machines} stand for those of its runs.
    """
    folder = RESULTS / name
    data = json.loads((folder / "data.json").read_text())
    failed = [run["name"] for run in data["runs"] if run["state"] != "finished"]
    seeds = " ".join(map(str, sorted({run["seed"] for run in data["runs"]})))
    parts = [
        said.format(seeds=seeds, machines=machines_of(data))
        + (f" Did not finish: {', '.join(failed)}." if failed else " All runs finished."),
        (folder / "table.md").read_text().strip(),
    ]
    kept = [(name, words) for name, words in FIGURES.items() if (folder / name).exists()]
    parts[1:1] = [f"![{words}]({(folder / name).relative_to(ROOT)})" for name, words in kept]
    return "\n\n".join(parts)


def sweep() -> str:
    return report(
        "sweep_digits",
        "A real report of this tool, made by `ham sweep ablations --seeds {seeds} --attacks clean pgd20 cw20` on the "
        "digits (and `ham evaluate RUN --attacks autoattack --images 100` for PGD-AT and HAM, then "
        "`ham report runs/sweep-digits`); {machines}.",
    )


def cheaper() -> str:
    return report(
        "sweep_cheaper",
        "Cheaper courses of a whole run, `ham sweep cheaper --seeds {seeds} --attacks clean pgd20 cw20` on the digits; "
        "{machines}.",
    )


def cifar_small() -> str:
    (section,) = json.loads((RESULTS / "sweep_cifar_small" / "data.json").read_text())["sections"]
    words = {True: "**holds here**", False: "**does not hold here**", None: "not judged"}
    lines = [f"- {c['claim']}: {c['measured']}: {words[c['holds']]}" for c in section["claims"]]
    stay = {
        group["title"]: entry["stay_share"]["mean"]
        for group in section["groups"]
        for entry in group["easy"]["by_m"]
        if entry["m"] == 3
    }
    shares = ", ".join(f"{100 * share:.0f} % ({title})" for title, share in stay.items())
    lines.append(f"- of the examples that are easy at M=3, so many resist all {section['groups'][0]['easy']['steps']} "
                 f"steps (paper: 75 %): {shares}")  # fmt: skip
    table = report(
        "sweep_cifar_small",
        "The same on CIFAR-10 images, as far as two cores go: a small CNN, 10,000 training and 2,000 test images (of a "
        "slightly lossy JPEG copy), 20 epochs. `ham sweep baseline --seeds {seeds} --dataset "
        "cifar10 --path cifar10-jpeg.tar.xz --model small_cnn --train-images 10000 --test-images 2000 --val-images 500 "
        "--epochs 20 --precision bf16 --channels-last on --compile on --winograd on --attacks clean pgd20 cw20 --out "
        "runs/cifar-small`, then `ham sweep ham` with the same flags, `ham evaluate RUN --attacks autoattack --images "
        "100 --no-masking --no-analyses` of each run, and `ham report runs/cifar-small`; {machines}. The other core "
        "had other work, so that times are rough.",
    )
    return "\n\n".join([table, "\n".join(lines)])


def numerics() -> str:
    return report(
        "sweep_numerics",
        "What precision and Winograd do to accuracy: `ham sweep baseline --seeds {seeds} --attacks clean pgd20 cw20 "
        "--out runs/numerics/fp32` on the digits, `ham sweep ham` with the same flags, both again with "
        "`--winograd require`, with `--precision bf16`, and with both, each kind in a folder of its own, then "
        "`ham report` of the four folders; {machines}.",
    )


def newest(pattern: str) -> dict | None:
    """The result of a GPU where there is one, else that of a CPU."""
    found = sorted(RESULTS.glob(pattern), key=lambda p: (p.stem.endswith("_cpu"), p.name))
    return json.loads(found[0].read_text()) if found else None


def training() -> str:
    result = newest("bench_training_*.json")
    return "" if result is None else _training_report.readme_section(result)


def kernels() -> str:
    result = newest("kernels_*.json")
    return "" if result is None else _kernel_report.readme_section(result)


def winograd() -> str:
    return bench_winograd.readme_section(json.loads((RESULTS / "bench_winograd_cpu.json").read_text()))


def costs() -> str:
    """What a run costs beside its training."""
    loading = json.loads((RESULTS / "bench_input_cpu.json").read_text())
    run = json.loads((RESULTS / "bench_run_cpu.json").read_text())
    m, saved, memory = run["machine"], run["checkpoint"], loading["memory"]
    share = next(v for v in run["verdicts"] if v["goal"].startswith("checkpoint"))
    return (
        f"Beside the training, on {m['cpu']}, cores: {m['cores']}, torch {m['torch']}, {m['date']}: "
        f"{memory['median']:,.0f} CIFAR-sized images/s cropped and flipped from memory (`bench_input.py`); a "
        f"checkpoint of PreActResNet-18 with its weight average ({saved['bytes'] / 1e6:.0f} MB), and both "
        f"kinds of best weights, take {saved['median']:.1f} s, {share['measured']} of an epoch of PGD-AT here; "
        f"`ham --help` {run['help']['ham --help']['median']:.2f} s (`bench_run.py`)."
    )


SECTIONS = {
    "bench_pgd": bench_pgd,
    "cifar_small": cifar_small,
    "sweep": sweep,
    "costs": costs,
    "training": training,
    "winograd": winograd,
    "numerics": numerics,
    "cheaper": cheaper,
    "kernels": kernels,
}


def written(text: str) -> str:
    """README with every section made anew."""
    for name, make in SECTIONS.items():
        start, end = f"<!-- {name}: written by benchmarks/update_readme.py -->", f"<!-- {name}: end -->"
        head, rest = text.split(start)
        _, tail = rest.split(end)
        text = f"{head}{start}\n{make()}\n{end}{tail}"
    return text


def main() -> int:
    text = README.read_text()
    new = written(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README is not what results say: run python benchmarks/update_readme.py", file=sys.stderr)
            return 1
        return 0
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
