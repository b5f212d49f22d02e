"""The time of a step on many devices, compared with sums by hand."""

import sys
from dataclasses import replace

import pytest

from stylegan_pg.__main__ import main
from stylegan_pg.config import Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.errors import UsageError
from stylegan_pg.planning.cost import Cost, cost_of
from stylegan_pg.planning.scaling import HIDDEN, REPLAY, Link, step, sum_seconds, sums, table

COST = Cost(g_parameters=3_000_000, d_parameters=1_000_000, flops_per_image=1e9, fixed_bytes=0, bytes_per_image=0)
SMALL = ["run=runs/small", "data.url=none", "resolution=16", "train.total_kimg=1", "train.batch=64"]


def config_of(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def test_all_reduces_of_a_step():
    """G's main step, path length every fourth step, D's main step, and R1 every sixteenth step. Terms that are added to
    a main step share its all-reduce."""
    config = config_of("loss.r1_every=16", "loss.pl_every=4", "optim.d_steps=2", "loss.terms=[{name: r2}]")
    assert sorted(sums(config, phases(config)[0], COST)) == sorted(
        [(1.0, 4e6), (0.5, 12e6), (1 / 16, 4e6), (0.5 / 4, 12e6)]
    )
    off = config_of("loss.r1_gamma=1", "loss.r1_gamma_at={16: 0}", "loss.pl_weight=0")
    assert sorted(sums(off, phases(off)[0], COST)) == [(1.0, 4e6), (1.0, 12e6)]
    double = config_of("train.dtype=float64", "loss.r1_gamma=0", "loss.pl_weight=0")
    assert sorted(sums(double, phases(double)[0], COST)) == [(1.0, 8e6), (1.0, 24e6)]


def test_one_all_reduce():
    slow = Link(8e6, 0.001)  # a million bytes per second
    assert sum_seconds(1e6, 1, slow) == 0
    assert sum_seconds(1e6, 2, slow) == pytest.approx(1 + 0.002)
    assert sum_seconds(1e6, 4, slow, pieces=3) == pytest.approx(1.5 + 3 * 4 * 0.001)
    assert sum_seconds(1e6, 1024, slow) == pytest.approx(2 * 1023 / 1024 + 0.02)


def test_a_step_by_hand():
    config = config_of("loss.r1_gamma=0", "loss.pl_weight=0", "train.bucket_mib=1")
    phase, link = phases(config)[0], Link(8e9, 0)
    alone = step(config, phase, COST, 1, 1e12, link)
    assert (alone.seconds, alone.share) == (pytest.approx(0.064), 64)
    assert alone.summing == alone.hidden == 0
    four = step(config, phase, COST, 4, 1e12, link)
    assert four.host == 0
    assert four.computing == pytest.approx(0.016)
    takes = [1.5 * 4e-3, 1.5 * 12e-3]  # for the bytes of D and of G, at 1 GB/s
    assert four.summing == pytest.approx(sum(takes))
    windows = [HIDDEN * 0.016 / 4, HIDDEN * 0.016 * 3 / 4]
    pieces = [4, 12]
    both = zip(takes, pieces, windows, strict=True)
    assert four.hidden == pytest.approx(sum(min(t * (1 - 1 / n), w) for t, n, w in both))
    assert four.seconds == pytest.approx(four.computing + four.summing - four.hidden)
    fast = step(config, phase, COST, 4, 1e12, Link(8e15, 0))
    assert fast.seconds == pytest.approx(0.016, rel=1e-3)
    zero = config_of("loss.r1_gamma=0", "loss.pl_weight=0", "train.bucket_mib=1", "train.engine=deepspeed")
    assert step(zero, phase, COST, 4, 1e12, link).hidden == 0
    one_piece = step(config_of("loss.r1_gamma=0", "loss.pl_weight=0"), phase, COST, 4, 1e12, link)
    assert one_piece.hidden < four.hidden


def test_overlap_of_all_reduces_with_passes():
    link = Link(8e7, 0)
    whole, parts = (config_of(f"train.micro_batch={n}", "train.bucket_mib=0.1") for n in (0, 4))
    at_once, in_four = (step(c, phases(c)[0], COST, 4, 1e12, link) for c in (whole, parts))
    assert in_four.hidden == pytest.approx(at_once.hidden / 4)


def test_devices_without_work():
    config = config_of("train.batch=8")
    phase = phases(config)[0]
    made = [step(config, phase, COST, n, 1e12, Link()) for n in (1, 2, 4)]
    assert [s.share for s in made] == [8, 4, 4]
    text = table(made, phase, Link())
    assert "occupies at most 2 devices" in text[-1]
    assert len(text) == 1 + 1 + 3 + 1
    assert "100%" in text[2].split()


def test_invalid_links():
    for bits in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="--link-gbit"):
            Link(bits)


def test_from_the_command_line(monkeypatch, capsys):
    def printed(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", "plan", "demo", "train.batch=4096", *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    def efficiency(text: str) -> list[int]:
        rows = [line.split() for line in text.splitlines() if "%" in line and " ms  " in line]
        assert [int(r[0]) for r in rows] == [1, 8, 16, 32, 64, 128, 256, 512, 1024]
        return [int(next(cell for cell in r if cell.endswith("%")).rstrip("%")) for r in rows]

    slow, fast = (efficiency(printed("--host-us", "0", "--link-gbit", rate)) for rate in ("1", "400"))
    assert slow[0] == fast[0] == 100
    assert all(a <= b for a, b in zip(slow, fast, strict=True))
    assert slow[-1] < fast[-1]
    assert slow == sorted(slow, reverse=True)


def test_a_step_takes_at_least_as_long_as_its_host():
    config = config_of("loss.r1_gamma=0", "loss.pl_weight=0")
    phase, cost = phases(config)[0], replace(COST, launches=700)
    slow, fast = Link(8e6, 0), Link(8e15, 0)
    alone = step(config, phase, cost, 1, 1e12, fast, 5e-5)
    assert (alone.host, alone.seconds, alone.bound) == (pytest.approx(0.035), pytest.approx(0.064), "computing")
    many = step(config, phase, cost, 16, 1e12, fast, 5e-5)
    assert (many.seconds, many.bound) == (pytest.approx(0.035, rel=1e-3), "host")
    assert step(config, phase, cost, 16, 1e12, slow, 5e-5).bound == "links"
    assert (alone.replayed, many.replayed) == (pytest.approx(0.064), pytest.approx(0.004, rel=1e-3))
    assert step(config, phase, replace(COST, launches=7e6), 16, 1e12, fast).replayed == pytest.approx(
        7e6 * REPLAY, rel=1e-3
    )
    parts = config_of("loss.r1_gamma=0", "loss.pl_weight=0", "train.micro_batch=16")
    assert step(parts, phases(parts)[0], cost, 1, 1e12, fast, 5e-5).host == pytest.approx(4 * 0.035)
    head, first, second = [line.split("  ") for line in table([alone, many], phase, fast)[1:4]]
    columns = [cell.strip() for cell in head if cell]
    for line, bound in ((first, "computing"), (second, "host")):
        cells = dict(zip(columns, [cell.strip() for cell in line if cell], strict=True))
        assert (cells["host"], cells["bound by"]) == ("35 ms", bound)


def test_operations_are_counted_on_the_meta_device_as_a_step_makes_them():
    """Within a tenth of those that benchmarks/launches.py counts on a CPU."""
    config = config_of("resolution=64", "loss.r1_gamma=0", "loss.pl_weight=0")
    assert 600 < cost_of(config, phases(config)[-1], 3, 0).launches < 740
