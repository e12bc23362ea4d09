"""The body of the CUDA compaction kernel, run on the host.

g++ compiles csrc/compact.cuh against a small model of CUDA (tests/host_cuda): a CUDA thread is a std::thread.
"""

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
GUARD = 64  # run_compact.cpp: words of poison on both sides of index
POISON = -0x55555555

# 0 and 1; one warp; one CTA of one flag per thread; one tile of 16 flags per thread; several tiles, each of a CTA or
# of as many as there may be.
SIZES = [0, 1, 31, 32, 33, 1023, 1024, 1025, 16383, 16384, 16385, 40000, 65536]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernel for the host"),
]


@pytest.fixture(scope="module", params=[64, 2])
def program(request, tmp_path_factory):
    """Of so many CTAs at most."""
    binary = tmp_path_factory.mktemp("host_cuda") / "run_compact"
    command = ["g++", "-std=c++20", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # A misaligned 16-byte load is an error on a GPU; here it traps.
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += [f"-DHAM_COMPACT_BLOCKS={request.param}", f"-I{TESTS / 'host_cuda'}", f"-I{TESTS.parent / 'csrc'}"]
    command += [str(TESTS / "host_cuda" / "run_compact.cpp"), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binary


def run(program, cases):
    """cases: (flag bytes, offset from a 16-byte boundary).

    Returns per case (error, count with the words around it, index with the words around it).
    """
    stdin = b"".join(struct.pack("=II", len(flags), offset) + flags for flags, offset in cases)
    done = subprocess.run([program], input=stdin, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    results, position = [], 0
    for flags, _ in cases:
        words = len(flags) + 2 * GUARD + 4
        error, *rest = struct.unpack_from(f"={words}i", done.stdout, position)
        results.append((error, rest[:3], rest[3:]))
        position += 4 * words
    assert position == len(done.stdout)
    return results


def check(program, cases, seed):
    for (flags, offset), (error, count, index) in zip(cases, run(program, cases), strict=True):
        case = f"n={len(flags)}, offset={offset}, seed={seed}"
        positions = range(len(flags))
        trues = [p for p in positions if flags[p]]
        falses = [p for p in reversed(positions) if not flags[p]]
        guard = [POISON] * GUARD
        assert error == 0, case
        assert count == [POISON, len(trues), POISON], case
        assert index == guard + trues + falses + guard, case


@pytest.mark.parametrize("n", SIZES)
def test_all_none_and_random_flags(program, seed, n):
    rng = random.Random(seed + n)
    share = rng.random()
    random_flags = bytes(rng.random() < share for _ in range(n))
    check(program, [(bytes(n), 0), (b"\1" * n, 0), (random_flags, 0)], seed)


@pytest.mark.parametrize("n", [33, 1025, 16385])
def test_any_start_address(program, seed, n):
    rng = random.Random(seed + n)
    offsets = (1, 8, 15)
    check(program, [(bytes(rng.getrandbits(1) for _ in range(n)), offset) for offset in offsets], seed)


@pytest.mark.parametrize("n", [1000, 20000])
def test_every_nonzero_byte_is_true(program, seed, n):
    rng = random.Random(seed + n)
    # 0x80 and 0x01 are the ends of a byte's range, where tricks with whole words go wrong.
    flags = bytes(rng.choice((0, 0, 0, 0x01, 0x80, 0x7F, 0xFF, rng.randrange(256))) for _ in range(n))
    check(program, [(flags, 0)], seed)


def test_one_true_flag_at_each_seam(program, seed):
    """The first and the last flag of a load, a warp's share, a tile and a block's share."""
    n = 2 * 16384 + 600
    seams = [0, 15, 16, 511, 512, 16383, 16384, 32767, 32768, n - 1]
    check(program, [(bytes(p == seam for p in range(n)), 0) for seam in seams], seed)
