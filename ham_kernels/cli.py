"""The command line: `python -m ham_kernels COMMAND`, or `ham COMMAND`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m ham_kernels COMMAND

  doctor [--json]   which backend each op uses on this machine, and why
  build             compile the CUDA extension of a checkout in place, and show what the compiler says
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, *rest = argv or ["--help"]
    if command == "doctor":
        from . import doctor

        return doctor.main(rest)
    if command == "build":
        from . import _build

        return _build.main(rest)
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(f"ham_kernels: no command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
    return 2
