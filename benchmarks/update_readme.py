"""Writes README's benchmark section from benchmarks/results/bench_pgd_digits.json; --check only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from _results import cells, markdown, verdict_lines

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "bench_pgd_digits.json"
START, END = "<!-- bench_pgd: written by benchmarks/update_readme.py -->", "<!-- bench_pgd: end -->"


def section(result: dict) -> str:
    s, m = result["settings"], result["machine"]
    setup = (
        f"Digits, 1×8×8, ε {s['eps']:g}, step {s['step_size']:g}, K {s['steps']}, M {s['screen_steps']}, "
        f"λ {s['lam']:g}, {s['warmup']} warm-up epochs of {s['epochs']}, {s['seeds']} seeds, mean ± std. "
        f"Machine: {m['cpu']}, cores: {m['cores']}, GPU: {m['gpu']}; Python {m['python']}, torch {m['torch']}, "
        f"torchattacks {m['torchattacks']}; {m['date']}."
    )
    lines = [f"- {line}" for line in verdict_lines(result)]
    return "\n\n".join([setup, markdown(cells(result["table"])), "\n".join(lines)])


def main() -> int:
    text = README.read_text()
    head, rest = text.split(START)
    _, tail = rest.split(END)
    new = f"{head}{START}\n{section(json.loads(RESULT.read_text()))}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if new != text:
            print(
                f"README's table is not that of {RESULT.name}: run python benchmarks/update_readme.py", file=sys.stderr
            )
            return 1
        return 0
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
