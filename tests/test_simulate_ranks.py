"""The simulation of a step on several GPUs: limits that are known, and a table that was computed another way."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import simulate_ranks  # noqa: E402
from scaling import table  # noqa: E402
from scaling.inputs import NETS, Links, Training  # noqa: E402
from scaling.step import COMMUNICATION, PARTS, draw, simulate  # noqa: E402

from ham_kernels import models  # noqa: E402

SMALL, LARGE = NETS["preact_resnet18"], NETS["wrn_28_10"]
DRAWS = 200


def cell(net=SMALL, gpus=8, rows=128, how=Training(), links=Links(), draws=DRAWS) -> dict:  # noqa: B008, frozen
    return simulate(net, gpus, rows * gpus, how, links, draws, seed=0)


@pytest.mark.parametrize("easy", ["drop", "stop"])
def test_one_rank_loses_nothing_and_costs_what_the_method_costs(easy):
    one = cell(gpus=1, how=Training(easy=easy))
    assert one["lost"] == one["lost_balanced"] == one["communication"] == one["moves"] == 0
    h = draw(1, 128, 0.3, DRAWS, 0).total.mean() / 128
    forwards = 7 + 17 * h if easy == "drop" else 7 + 14 * h + 3
    assert one["step"] == pytest.approx(forwards * 128 * 22e-6)
    assert max(one["parts"][name] for name in (*COMMUNICATION, "launches", "imbalance")) < 1e-12


def test_parts_add_up_and_none_is_negative():
    for net in NETS.values():
        for rows in (1, 128):
            for gpus in (1, 2, 64):
                c = cell(net, gpus, rows, draws=20)
                assert list(c["parts"]) == list(PARTS)
                assert all(value >= 0 for value in c["parts"].values())
                assert c["step"] == pytest.approx(sum(c["parts"].values()))


# By other code: the fullest rank over the mean; time lost in % as it is, then rebalanced, for the three models. There a
# move costs one latency, a forward has no least time, and rows always move.
BY_OTHER_CODE = {
    (16, 8, 0.3): (1.56, 23.4, (4.8, 4.0, 4.1)),
    (128, 8, 0.1): (1.39, 7.6, (0.8, 0.7, 0.7)),
    (128, 8, 0.3): (1.19, 8.2, (0.6, 0.5, 0.5)),
    (128, 64, 0.3): (1.32, 13.6, (1.2, 0.6, 0.8)),
    (128, 512, 0.3): (1.42, 17.8, (3.0, 1.0, 1.3)),
    (1024, 8, 0.3): (1.07, 2.9, (0.1, 0.1, 0.1)),
}


@pytest.mark.parametrize("case", BY_OTHER_CODE)
def test_an_independent_table_agrees(case):
    rows, gpus, h = case
    ratio, lost, balanced = BY_OTHER_CODE[case]
    how, links = Training(hard=h, messages=1), Links(launch_us=0.0)
    for net, want in zip(NETS.values(), balanced, strict=True):
        c = cell(net, gpus, rows, how, links)
        assert c["most_over_mean"] == pytest.approx(ratio, abs=0.04)
        assert 100 * c["lost"] == pytest.approx(lost, rel=0.08)
        assert 100 * c["lost_balanced"] == pytest.approx(want, abs=0.6)


def test_where_nothing_moves_nothing_is_lost_by_rebalancing():
    for gpus, rows in ((2, 256), (2, 1024)):
        c = cell(gpus=gpus, rows=rows)
        assert c["moves"] == c["moved"] == c["parts"]["moving"] == 0
        assert c["lost_balanced"] == c["lost"] > 0
        assert c["step"] == c["step_unbalanced"]


def test_rebalancing_saves_where_a_row_costs_more_than_a_message():
    c = cell(LARGE, 8, 128)
    assert c["moves"] > 0.9
    assert c["lost_balanced"] < 0.2 * c["lost"]
    assert c["step"] < c["step_unbalanced"]
    # and not where it costs less: the rule does not know the time of a row
    c = cell(dataclasses.replace(SMALL, row_us=0.1), 64, 128, links=Links(launch_us=0.0))
    assert c["lost_balanced"] > c["lost"]


def test_messages_cost_what_the_links_say():
    links = Links()
    assert links.all_reduce(0, 8) == pytest.approx(40e-6)
    assert links.all_reduce(0, 64) == pytest.approx(100e-6)  # three doublings of the nodes
    assert links.all_reduce(44.7e6, 8) - links.all_reduce(0, 8) == pytest.approx(2 * 44.7e6 * 7 / 8 / 200e9)
    assert links.all_gather(0, 512) == pytest.approx(551e-6)
    assert [round(1e6 * links.all_to_all(0, n)) for n in (2, 8, 64, 512)] == [40, 40, 200, 800]
    free = Links(
        latency_us=0, doubling_us=0, hop_us=0, exchange_us=0, wait_us=0, node_gb_s=float("inf"), net_gb_s=float("inf")
    )
    assert cell(links=free)["communication"] == 0
    assert cell(how=Training(sync_bn=False))["parts"]["sync_bn"] == 0
    late, early = (cell(LARGE, how=Training(overlap=overlap))["parts"]["gradients"] for overlap in (False, True))
    assert late > early == 0


@pytest.mark.slow  # loads torchvision
def test_what_is_said_of_the_models_is_so():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):  # shapes alone
        nets = {name: models.create(name, 10) for name in ("preact_resnet18", "wrn_28_10")}
        nets["resnet50"] = torchvision.models.resnet50()
    assert nets.keys() == NETS.keys()
    for name, net in nets.items():
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        said = NETS[name]
        assert said.parameters == sum(p.numel() for p in net.parameters())
        assert said.convolutions == sum(isinstance(m, nn.Conv2d) for m in net.modules())
        assert (said.bn_layers, said.bn_channels) == (len(norms), sum(m.num_features for m in norms))


def test_the_command_writes_what_the_page_is_made_of(tmp_path, capsys):
    out = tmp_path / "result.json"
    flags = ["--nets", "resnet50", "--row-us", "60", "--gpus", "8", "--draws", "5", "--hop-us", "2", "--overlap"]
    assert simulate_ranks.main([*flags, "--out", str(out)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "ResNet-50, 224², strong scaling" in printed
    assert [c["gpus"] for c in result["weak"]["resnet50"]] == [1, 8]
    assert "| ResNet-50, 224² | 60 |" in table.assumptions(result)
    assert result["settings"]["links"]["hop_us"] == 2
    for section in (table.weak, table.strong, table.sync_bn, table.rebalance, table.variants):
        assert "ResNet-50" in section(result)


def test_the_page_is_of_this_code():
    """Cells of the stored result, drawn again with fewer steps."""
    result = json.loads((ROOT / "benchmarks/results/simulate_ranks.json").read_text())
    s = result["settings"]
    how, links = Training(**s["training"]), Links(**s["links"])
    assert {name: dataclasses.asdict(net) for name, net in NETS.items()} == s["nets"]
    for name, net in NETS.items():
        for stored in result["weak"][name][:6]:
            again = simulate(net, stored["gpus"], s["rows"] * stored["gpus"], how, links, DRAWS, s["seed"])
            assert again["step"] == pytest.approx(stored["step"], rel=0.01)
            assert again["lost_balanced"] == pytest.approx(stored["lost_balanced"], abs=0.003)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "--gpus: got 0; it must be >= 1"),
        (["--hard", "0"], "--hard: got 0.0; it must be > 0"),
        (["--screen-steps", "10"], "--screen-steps: got 10; it must be >= 1 and < --steps, which is 10"),
        (["--rows", "0"], "--rows: got 0; it must be >= 1"),
    ],
)
def test_bad_settings_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        simulate_ranks.parse(flags)
    assert message in capsys.readouterr().err
