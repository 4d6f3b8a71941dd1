import csv
import re
import subprocess
import sys

import pytest

from batchformer.report import ReportError, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_comparison_becomes_a_report_whose_links_and_tables_hold(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", folders.all_arms, range(3))
    (folder / "frozen" / "seed1" / "done").unlink()
    paths = write_report([folder], tmp_path / "out" / "report")
    text = paths.report.read_text(encoding="utf-8")
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == [path.name for path in paths.plots]
    assert len(links) == 5
    assert all((paths.report.parent / link).read_bytes().startswith(PNG) for link in links)
    for expected in (
        "`batchformer compare longtail/fashion-mnist-lt --seeds 3`",
        "Checkpoint selection: last epoch",
        "Split: test",
        "Hardware: cpu Example CPU @ 2.00GHz",
        "Precision: 32-true",
        "torch 2.9.0",
        "Seeds: 0, 1, 2",
        "Date: 2026-01-02T03:04:05+00:00",
        "frozen/seed1: unfinished",
        "self_only: the same layer, trained, each sample attending to itself alone.",
        "Only 3 paired seeds",
        "4 other intervals against plain or a control, each at 99 %: all of them hold at once in 19 of 20",
    ):
        assert expected in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert paths.notes == ()
    with paths.results.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 18
    assert paths.per_class.is_file()
    assert paths.differences.is_file()


def test_several_comparisons_and_single_runs_share_a_report(folders, tmp_path):
    folders.comparison(tmp_path / "runs" / "one" / "ce", seeds=(0,))
    folders.comparison(tmp_path / "runs" / "two" / "ce", seeds=(0,))
    folders.comparison(tmp_path / "runs" / "two" / "bs", seeds=(0,))
    folders.run(tmp_path / "runs" / "single")
    folders.run(tmp_path / "runs" / "stopped", done=False)
    paths = write_report([tmp_path / "runs"], tmp_path / "out")
    names = [path.name for path in paths.plots]
    assert len(names) == len(set(names)) == 15
    assert sum(name.startswith("bs-") for name in names) == 5
    text = paths.report.read_text(encoding="utf-8")
    assert text.count("## longtail/fashion-mnist-lt") == 3
    assert "## Runs that are not in the tables" in text
    assert "stopped: unfinished" in text
    assert "the table claims no differences" in text


def test_a_single_run_makes_no_claims(folders, tmp_path):
    paths = write_report([folders.run(tmp_path / "run", "batchformer", 7)], tmp_path / "out")
    text = paths.report.read_text(encoding="utf-8")
    assert paths.differences is None
    assert paths.plots == ()
    assert "| run | longtail/fashion-mnist-lt | batchformer | 7 |" in text
    assert not re.search("improves|worsens|no difference shown", text)


def test_a_comparison_without_a_finished_run_says_so(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,), done=False)
    paths = write_report([folder], tmp_path / "out")
    text = paths.report.read_text(encoding="utf-8")
    assert "Missing from the tables: 2 of 2 planned runs." in text
    assert "nothing can be said about it yet" in text
    assert paths.plots == ()
    assert any("No plot of differences" in note for note in paths.notes)


def test_without_matplotlib_everything_else_is_written_and_the_report_says_why(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    paths = write_report([folders.comparison(tmp_path / "cmp", seeds=(0,))], tmp_path / "out")
    assert paths.plots == ()
    assert paths.notes == ("No plots: Plots need matplotlib: pip install 'batchformer[plots]'",)
    assert paths.notes[0] in paths.report.read_text(encoding="utf-8")


def test_nothing_usable_writes_nothing(tmp_path):
    with pytest.raises(ReportError, match="does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_can_be_written_again_and_leaves_no_temporary_files(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,))
    first = write_report([folder], folder / "report")
    second = write_report([folder], folder / "report")
    assert first == second
    assert sorted(path.name for path in (folder / "report").iterdir()) == sorted(
        path.name for path in (first.report, first.results, first.per_class, first.differences, *first.plots)
    )


def test_importing_report_loads_neither_matplotlib_nor_scipy_nor_torch_models():
    code = (
        "import sys, batchformer.report; print([m for m in ('matplotlib', 'scipy', 'lightning') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
