"""Sections of docs/scaling.md, from what simulate_ranks.py computes. `here` is the page's folder."""

from __future__ import annotations

from pathlib import Path

from scaling import table

from readme import measured


def _result() -> dict:
    return measured.read("simulate_ranks.json")


def assumptions(here: Path) -> str:
    return table.assumptions(_result())


def weak(here: Path) -> str:
    return table.weak(_result())


def strong(here: Path) -> str:
    return table.strong(_result())


def sync_bn(here: Path) -> str:
    return table.sync_bn(_result())


def rebalance(here: Path) -> str:
    return table.rebalance(_result())


def variants(here: Path) -> str:
    return table.variants(_result())
