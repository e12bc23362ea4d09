"""Writes the made sections of README.md and docs/: measured and simulated ones from benchmarks/results/, the table of
methods from the registry, and the messages from their table. --check only compares.

A section lies between <!-- NAME: ... --> and <!-- NAME: end -->. Reports of `ham` are copied to benchmarks/results/
(data.json, table.md, figures), results of benchmarks land there by their --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from readme import computed, measured, reports, timed
from readme.frontier import frontier
from readme.methods_table import details, methods
from readme.presets import presets
from readme.questions import questions
from readme.screened import screened, screened_field
from readme.troubles import troubles

ROOT = Path(__file__).resolve().parents[1]
Sections = Mapping[str, Callable[[Path], str]]
PAGES: dict[Path, Sections] = {
    ROOT / "README.md": {
        "frontier": frontier,
        "claims": measured.claims,
        "bench_pgd": measured.bench_pgd_short,
        "sweep": reports.sweep_figure,
        "methods": methods,
        "training": timed.training_short,
        "gpu": measured.gpu,
    },
    ROOT / "docs" / "results.md": {
        "methods_digits": reports.kept("methods_digits"),
        "field_digits": reports.kept("field_digits"),
        "long_digits": reports.kept("long_digits"),
        "fair_digits": reports.kept("fair_digits"),
        "screened_digits": screened,
        "screened_field_digits": screened_field,
        "methods_cifar10": reports.kept("methods_cifar10"),
        "fair_cifar10": reports.kept("fair_cifar10"),
        "field_cifar10": reports.kept("field_cifar10"),
        "odi": reports.odi,
        "autoattack": timed.autoattack,
        "bench_pgd": measured.bench_pgd,
        "cifar_small": reports.cifar_small,
        "sweep": reports.sweep,
        "cheaper": reports.kept("cheaper"),
        "training": timed.training,
        "method_steps": timed.method_steps,
        "winograd": timed.winograd,
        "numerics": reports.kept("numerics"),
        "kernels": timed.kernels,
        "costs": timed.costs,
    },
    ROOT / "docs" / "methods.md": {
        "methods": methods,
        "presets": presets,
        "fair": timed.fair,
        "questions": questions,
        "method_details": details,
    },
    ROOT / "docs" / "training.md": {"ranks": timed.ranks},
    ROOT / "docs" / "scaling.md": {
        "assumptions": computed.assumptions,
        "weak": computed.weak,
        "strong": computed.strong,
        "sync_bn": computed.sync_bn,
        "rebalance": computed.rebalance,
        "variants": computed.variants,
    },
    ROOT / "docs" / "troubleshooting.md": {"troubles": troubles},
}


def written(text: str, sections: Sections, here: Path) -> str:
    """A page with every section made anew. Raises: ValueError where it lacks one."""
    for name, make in sections.items():
        start, end = f"<!-- {name}: written by benchmarks/update_readme.py -->", f"<!-- {name}: end -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{name}: the page has {text.count(start)} such sections; it must have one")
        head, rest = text.split(start)
        _, tail = rest.split(end)
        text = f"{head}{start}\n{make(here)}\n{end}{tail}"
    return text


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing, and exit 1 where a page differs")
    check, stale = p.parse_args().check, []
    for page, sections in PAGES.items():
        text = page.read_text()
        new = written(text, sections, page.parent)
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new)
    if stale and check:
        print(f"not what the results say: {', '.join(stale)}; run python benchmarks/update_readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
