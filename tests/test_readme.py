"""README: its tables say what the committed results say."""

import re

from benchmarks.readme_tables import README, cell, rewritten
from tests.conftest import ROOT


def test_the_tables_are_made_from_the_committed_results():
    text = README.read_text(encoding="utf-8")
    assert rewritten(text) == text


def test_a_figure_is_told_with_its_interval_and_one_that_cannot_be_told_is_a_dash():
    assert cell(0.8178, [0.7968, 0.8380], bold=True) == "**0.818** [0.80, 0.84]"
    assert cell(None, None) == "-"


def test_every_picture_and_file_that_readme_links_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), link
