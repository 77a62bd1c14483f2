"""A sweep for people: table, plots, page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anyquant.errors import MachineError, UsageError
from anyquant.report.sweeps import prepare_sweep, sweep_page, sweep_plots, sweep_text, write_sweep
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.words import DASH
from anyquant.sweep import Sweep, load_sweep


def test_the_table_fits_80_columns(sweep_found: Sweep) -> None:
    one = replace(sweep_found, points=tuple(p for p in sweep_found.points if p.target["allocation"] == "model"))
    text = sweep_text(one)
    table = text.splitlines()[:5]
    assert max(map(len, table)) <= 80
    assert " ".join(table[2].split()) == "2.5 2.500 25.0 MB 0.120 0.400 0.380..0.420 23.6 90.0"
    assert table[4].split() == ["99", *[DASH] * 7]
    assert "99: too many" in text
    assert "source: 100 MB, perplexity 19.0 ± 1.0" in text


def test_small_losses_fit_80_columns(sweep_found: Sweep) -> None:
    kl, perplexity = Estimate(0.00523, 900, 2.1e-4, 0.00483, 0.00564), Estimate(12345.6, 900, 99.0, 12000.0, 12900.0)
    points = [replace(p, bits=3.251, nbytes=123_456_789, loss=5.23e-4, kl=kl) for p in sweep_found.points[:4]]
    points[1] = replace(points[1], kl=Estimate(5.23e-5, 900, 2.1e-6, 4.83e-5, 5.64e-5), perplexity=perplexity)
    points[2] = replace(points[2], target={"bits": 3.25, "allocation": "uniform"})
    lines = sweep_text(replace(sweep_found, points=tuple(points))).splitlines()[:6]
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[6:8] == ["0.00523", "0.00483..0.00564"]
    assert lines[3].split()[6:8] == ["5.23e-5", "4.83e-5..5.64e-5"]
    assert "±" not in "".join(lines)


def test_lines_are_named_after_their_allocation(sweep_found: Sweep) -> None:
    pytest.importorskip("matplotlib")
    drawn = sweep_plots(sweep_found)["Size and distance to the source"]  # a comment names every text
    assert "<!-- bits spread over the model -->" in drawn
    assert "<!-- the same bits everywhere -->" in drawn


def test_a_sweep_is_prepared(sweep_found: Sweep, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    prepare_sweep(folder)
    assert not folder.parent.exists()
    write_sweep(sweep_found, folder)
    prepare_sweep(folder)
    (folder / "sweep.json").write_text('{"schema": "another/1"}')
    with pytest.raises(UsageError, match=r"sweep\.json would be replaced"):
        prepare_sweep(folder)
    with pytest.raises(MachineError, match="cannot write the report"):
        prepare_sweep(folder / "sweep.json" / "c")


def test_settings_inside_settings_are_words(sweep_found: Sweep) -> None:
    settings = {"outliers": 0.0, "target": {"bits": 3.25, "allocation": "model"}, "skip": []}
    page = sweep_page(replace(sweep_found, settings=settings))
    assert "outliers: 0.0, target bits: 3.25, target allocation: model, skip: none" in page


def test_allocations_are_named_where_there_are_several(sweep_found: Sweep) -> None:
    lines = [line.split()[:2] for line in sweep_text(sweep_found).splitlines()[2:7]]
    assert lines == [["2.5", "model"], ["4", "model"], ["2.5", "uniform"], ["4", "uniform"], ["99", "model"]]


def test_columns_without_numbers_are_left_out(sweep_found: Sweep) -> None:
    points = tuple(replace(p, kl=None, perplexity=None, top1=None) for p in sweep_found.points[:2])
    text = sweep_text(replace(sweep_found, data=None, points=points))
    assert text.splitlines()[0].split() == ["target", "bits", "size", "loss"]
    assert text.splitlines()[2].split()[0] == "2.5"  # one allocation need not be named


def test_the_page_is_whole_and_self_contained(sweep_found: Sweep, check_page: Callable[[str], None]) -> None:
    pytest.importorskip("matplotlib")
    page = sweep_page(sweep_found)
    check_page(page)
    assert page.count("<svg") == 3
    assert "0.400 ± 0.010" in page
    assert "0.380..0.420" in page
    assert "25,000,000" in page
    assert page.count("&lt;script src=") >= 4


def test_what_was_not_measured_is_not_drawn(sweep_found: Sweep, check_page: Callable[[str], None]) -> None:
    pytest.importorskip("matplotlib")
    points = tuple(replace(p, kl=None, perplexity=None, top1=None) for p in sweep_found.points)
    found = replace(sweep_found, data=None, points=points, model={**sweep_found.model, "perplexity": None})
    assert list(sweep_plots(found)) == ["Size and predicted loss"]
    assert sweep_plots(replace(found, points=tuple(replace(p, loss=None) for p in points))) == {}
    check_page(sweep_page(found))
    check_page(sweep_page(replace(found, points=found.points[-1:])))


def test_a_model_is_marked(sweep_found: Sweep) -> None:
    pytest.importorskip("matplotlib")
    plain, marked = (sweep_plots(sweep_found, mark) for mark in (None, 30_000_000))
    assert all(marked[title].count("<path") > plain[title].count("<path") for title in plain)


def test_files_without_plots(sweep_found: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_sweep(sweep_found, tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["sweep.html", "sweep.json"]
    assert "anyquant[report]" in (tmp_path / "a" / "b" / "sweep.html").read_text(encoding="utf-8")
    assert load_sweep(tmp_path / "a" / "b" / "sweep.json") == sweep_found
