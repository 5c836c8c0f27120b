"""All figures of the studies are drawn again from what docs/studies records."""

import shutil

import pytest

from scripts.studies import figures
from tests.support.commands import ROOT
from tests.support.figures import assert_drawn

STUDIES = ROOT / "docs" / "studies"


def test_every_kind_of_record_is_in_the_docs():
    assert all(list(STUDIES.glob(pattern)) for pattern in figures.RECORDS)


@pytest.mark.slow
def test_figures_are_drawn_from_the_records(run, tmp_path):
    for name in ("deploy/repvgg_a0.json", "int8/digits.csv"):
        (tmp_path / "studies" / name).parent.mkdir(parents=True)
        shutil.copy(STUDIES / name, tmp_path / "studies" / name)

    run(figures, "docs=studies")

    assert_drawn(tmp_path / "studies" / "deploy" / "repvgg_a0-1")
    assert_drawn(tmp_path / "studies" / "int8" / "digits")
    page = (tmp_path / "studies" / "deploy" / "repvgg_a0.md").read_text()
    assert page == (STUDIES / "deploy" / "repvgg_a0.md").read_text()


def test_a_folder_without_records_is_one_line(run, capfd):
    with pytest.raises(SystemExit):
        run(figures, "docs=nowhere")

    assert "docs=nowhere holds no recorded numbers" in capfd.readouterr().err
