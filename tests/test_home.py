"""The base directory: how it is found, where everything lies, and what a file's name becomes."""

from __future__ import annotations

import re

import pytest

from finetuned.errors import HomeError
from finetuned.home import Home, data_extension, data_stem, find_home, printable, safe_name


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Three base directories: the current folder, the environment's, and one to name."""
    for name in ("here", "environment", "named"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FINETUNED_HOME", str(tmp_path / "environment"))
    return tmp_path


def test_the_option_goes_over_the_environment_and_that_over_the_current_folder(base, monkeypatch):
    assert find_home(base / "named").root == base / "named"
    assert find_home(None).root == base / "environment"
    monkeypatch.setenv("FINETUNED_HOME", "")
    assert find_home(None).root == base / "here"
    monkeypatch.delenv("FINETUNED_HOME")
    assert find_home(None).root == base / "here"


def test_a_relative_folder_and_a_tilde_are_made_absolute(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base))
    monkeypatch.setenv("FINETUNED_HOME", "~/named")
    assert find_home(None).root == base / "named"
    monkeypatch.setenv("FINETUNED_HOME", "../named")
    assert find_home(None).root == base / "named"


def test_a_folder_without_config_json_is_refused_with_what_to_do(base):
    (base / "environment" / "config.json").unlink()
    with pytest.raises(HomeError) as caught:
        find_home(None)
    assert caught.value.where == str(base / "environment")
    assert f"finetuned init {base / 'environment'}" in caught.value.remedy


def test_a_folder_that_is_not_there_is_refused_too(base):
    with pytest.raises(HomeError):
        find_home(base / "nowhere")


def test_every_path_lies_in_the_base_directory(tmp_path):
    home = Home(tmp_path)
    names = [name for name in vars(Home) if isinstance(vars(Home)[name], property) and name != "folders"]
    paths = [getattr(home, name) for name in names] + [*home.folders, home.job("x").path, home.job_log("x")]
    assert len(paths) > 15
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_what_users_look_at_lies_at_the_top(tmp_path):
    home = Home(tmp_path)
    assert home.inbox == tmp_path / "inbox"
    assert home.adapters == tmp_path / "adapters"
    assert home.archive == tmp_path / "archive"
    assert home.failed == tmp_path / "archive" / "failed"
    assert home.config_file == tmp_path / "config.json"


@pytest.mark.parametrize(
    ("name", "stem", "extension"),
    [
        (b"x.jsonl", "x", ".jsonl"),
        (b"x.jsonl.gz", "x", ".jsonl.gz"),
        (b"x.jsonl.zst", "x", ".jsonl.zst"),
        (b"x.json", "x", ".json"),
        (b"X.JsonL.GZ", "X", ".jsonl.gz"),
        (b"a.b.jsonl", "a.b", ".jsonl"),
        (b"x.jsonl.jsonl", "x.jsonl", ".jsonl"),
        (b"x.csv", "x.csv", ""),
        (b"x.gz", "x.gz", ""),
        (b"jsonl", "jsonl", ""),
        (b"\xff.jsonl", "\\xff", ".jsonl"),
        ("é.jsonl".encode(), "é", ".jsonl"),
    ],
)
def test_a_data_files_name_is_a_stem_and_an_extension(name, stem, extension):
    assert (data_stem(name), data_extension(name)) == (stem, extension)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        (b"units.jsonl", "units"),
        (b"My Data (final).jsonl.gz", "My-Data-final"),
        (b"v1.2_b.jsonl", "v1.2_b"),
        (b"../../etc/passwd.jsonl", "etc-passwd"),
        (b"-rf.jsonl", "rf"),
        (b"...jsonl", "data"),
        ("漢字.jsonl".encode(), "data"),
        ("café.jsonl".encode(), "caf"),
        (b"a\nb;c$(d).jsonl", "a-b-c-d"),
        (b"", "data"),
    ],
)
def test_a_safe_name_keeps_what_is_safe_everywhere(name, safe):
    assert safe_name(name) == safe


@pytest.mark.parametrize("name", [b"a" * 300, b"-." * 100, b"a." * 100, bytes(range(1, 256)), b"\xff" * 90])
def test_a_safe_name_is_one_short_harmless_word_whatever_comes_in(name):
    assert re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,46}[A-Za-z0-9_])?", safe_name(name))


def test_any_name_can_be_printed():
    assert printable(b"caf\xe9\xff.jsonl") == "caf\\xe9\\xff.jsonl"
    assert printable("é 漢字".encode()) == "é 漢字"
    printable(bytes(range(256))).encode()
