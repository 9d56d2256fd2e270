"""The documents keep step with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetuned.cli import cli
from finetuned.config import Config, load_config
from finetuned.findings import ERRORS, WARNINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()


def test_every_setting_is_in_the_readme_and_none_besides():
    keys = {field.alias or name for name, field in Config.model_fields.items()} - {"$schema"}
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == keys


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_every_verb_is_in_the_readme(verb):
    assert f"finetuned {verb}" in README


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["scale", "ray", "slurm"])
def test_every_config_that_a_page_shows_can_be_copied(page, tmp_path):
    shown = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    for text in shown:
        (tmp_path / "config.json").write_text(text)
        load_config(tmp_path / "config.json")


def test_the_readme_s_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make ([\w-]+)", README, re.MULTILINE)) <= targets


@pytest.mark.parametrize(("title", "found"), [("Errors", ERRORS), ("Warnings", WARNINGS)])
def test_every_code_of_the_report_is_in_its_table_with_meaning_and_remedy_and_none_besides(title, found):
    section = DATA.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert rows == [(code, finding.meaning, finding.remedy) for code, finding in found.items()]
