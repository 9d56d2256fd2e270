"""A config.json that the daemon found to be in order is not checked again by those who only want to know that."""

from __future__ import annotations

import pytest

from conftest import write_config
from finetuned import checked
from finetuned.checked import file_state, is_checked, remember_checked
from finetuned.status import gather


@pytest.fixture
def remembered(home):
    write_config(home, profiles={"fast": {}})
    remember_checked(home, file_state(home.config_file))
    return home


def test_it_is_known_to_be_in_order_until_it_changes(remembered):
    assert is_checked(remembered)
    assert gather(remembered)["config_error"] is None
    remembered.config_file.write_text('{"epochs": -1}')
    assert not is_checked(remembered)
    assert "epochs" in gather(remembered)["config_error"]


def test_nothing_is_known_of_one_that_no_daemon_has_seen(home):
    assert not is_checked(home)


def test_another_version_checks_for_itself(remembered, monkeypatch):
    monkeypatch.setattr(checked, "__version__", "0.0.1")
    assert not is_checked(remembered)


def test_profiles_are_known_without_the_check(remembered):
    (remembered.inbox / "fast").mkdir()
    (remembered.inbox / "fast" / "x.jsonl").write_text("{}\n")
    assert [entry["what"] for entry in gather(remembered)["inbox"]] == ["waits until it is whole and quiet"]
