"""Which files of the inbox are ready, when, and what is said against the rest. Real files, a clock of our own."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from finetuned.config import Config
from finetuned.spool.inbox import Complaint, Found
from finetuned.spool.settle import Look, Settler, is_nfs

LINE = b'{"messages": []}\n'
T = TypeVar("T")
CONFIG = Config(quiet_seconds=2, truncated_seconds=60, empty_seconds=3600, profiles={"fast": {}})


class Inbox:
    """An inbox and its watcher, with a clock that moves when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settler = Settler(folder)
        self.now = 1000.0

    def drop(self, name: str | bytes, content: bytes = LINE) -> Path:
        path = self.folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def look(self, *, after: float = 0.0, config: Config = CONFIG) -> Look:
        self.now += after
        return self.settler.look(config, self.now)

    def ready(self, *, after: float = 0.0, config: Config = CONFIG) -> list[str]:
        return [found.path.name for found in self.look(after=after, config=config).ready]

    def settled(self) -> list[str]:
        """What is ready when nothing happens for a while."""
        self.look()
        return self.ready(after=10)

    def complaint(self) -> Complaint:
        """The one complaint, which is made once and not again."""
        look = self.look()
        assert self.look(after=10).complaints == []
        assert self.ready(after=10_000) == []
        assert len(look.complaints) == 1
        assert look.complaints[0].remedy
        return look.complaints[0]


@pytest.fixture
def inbox(tmp_path) -> Inbox:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return Inbox(folder)


def without_privileges(what: Callable[[], T]) -> T:
    """Run in a thread that has given up every capability: root is then bound by modes and owners like anybody."""

    def run() -> T:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
        return what()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


# -- the quiet window


def test_an_empty_inbox_has_nothing(inbox):
    assert inbox.look() == Look([], [], [], None)


def test_a_file_is_ready_when_it_has_been_quiet_for_the_window(inbox):
    path = inbox.drop("x.jsonl")
    first = inbox.look()
    assert (first.ready, first.waiting) == ([], [path])
    assert first.again == pytest.approx(2)
    assert inbox.look(after=1.5).again == pytest.approx(0.5)
    assert inbox.ready(after=0.6) == ["x.jsonl"]


def test_a_file_that_was_there_before_the_daemon_is_not_ready_for_that(inbox):
    path = inbox.drop("x.jsonl")
    os.utime(path, (1, 1))
    assert Settler(inbox.folder).look(CONFIG, 5.0).ready == []


def test_a_ready_file_stays_ready_until_it_is_taken(inbox):
    path = inbox.drop("x.jsonl")
    assert inbox.settled() == ["x.jsonl"]
    assert inbox.ready(after=1) == ["x.jsonl"]
    path.unlink()
    assert inbox.look(after=1) == Look([], [], [], None)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(LINE)


def rewritten_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(LINE)


def put_in_its_place(path: Path) -> None:
    other = path.with_name(".other")
    other.write_bytes(path.read_bytes())
    facts = path.stat()
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(path)


def mode_changed(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.parametrize("change", [grown, rewritten_in_place, put_in_its_place, mode_changed])
def test_the_window_starts_again_with_every_change(inbox, change):
    path = inbox.drop("x.jsonl")
    inbox.look()
    inbox.look(after=1.9)
    change(path)
    assert inbox.ready(after=0.2) == []
    assert inbox.ready(after=1.9) == []
    assert inbox.ready(after=0.2) == ["x.jsonl"]


@pytest.mark.parametrize("change", [grown, rewritten_in_place, put_in_its_place, mode_changed, Path.unlink])
def test_a_ready_file_that_changes_before_its_turn_is_not_as_it_was_seen(inbox, change):
    path = inbox.drop("x.jsonl")
    inbox.look()
    (found,) = inbox.look(after=3).ready
    assert inbox.settler.is_as_seen(found)
    change(path)
    assert not inbox.settler.is_as_seen(found)


def test_of_very_many_ready_files_some_are_given_at_a_time_and_the_rest_need_not_wait_again(inbox):
    paths = [inbox.drop(f"{number:04}.jsonl") for number in range(1003)]
    inbox.look()
    look = inbox.look(after=3)
    assert [found.path for found in look.ready] == paths[:1000]
    assert 0 < look.again < 0.1
    for path in paths[:1000]:
        path.unlink()
    assert [found.path for found in inbox.look().ready] == paths[1000:]


def test_a_new_file_under_an_old_name_waits_for_itself(inbox):
    path = inbox.drop("x.jsonl")
    assert inbox.settled() == ["x.jsonl"]
    path.unlink()
    inbox.look(after=1)
    inbox.drop("x.jsonl")
    assert inbox.ready(after=1) == []


def test_files_become_ready_each_by_itself_in_the_order_of_their_names(inbox):
    inbox.drop("b.jsonl")
    inbox.drop("a.jsonl")
    inbox.look()
    inbox.drop("c.jsonl")
    inbox.look(after=1)
    assert inbox.ready(after=1.1) == ["a.jsonl", "b.jsonl"]
    assert inbox.ready(after=1.1) == ["a.jsonl", "b.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.json", "X.JSONL", "a b é.jsonl", b"\xff.jsonl"]
)
def test_these_are_data_files(inbox, name):
    inbox.drop(name)
    inbox.look()
    assert [found.name for found in inbox.look(after=3).ready] == [os.fsencode(name)]


# -- writers


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_a_file_that_somebody_has_open_for_writing_is_not_ready_however_quiet(inbox, flags):
    path = inbox.drop("x.jsonl")
    descriptor = os.open(path, flags)
    inbox.look()
    look = inbox.look(after=1000)
    assert (look.ready, look.waiting) == ([], [path])
    assert look.again is not None
    assert 0 < look.again <= 2
    os.close(descriptor)
    assert inbox.ready(after=1) == ["x.jsonl"]


def test_a_writer_is_seen_through_a_rename(inbox):
    path = inbox.drop(".x.jsonl.upload")
    descriptor = os.open(path, os.O_WRONLY)
    path.rename(inbox.folder / "x.jsonl")
    assert inbox.settled() == []
    os.close(descriptor)
    assert inbox.ready(after=1) == ["x.jsonl"]


def test_a_writer_is_seen_behind_its_mapping(inbox):
    path = inbox.drop("x.jsonl")
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    assert inbox.settled() == []
    mapping.close()
    assert inbox.ready(after=1) == ["x.jsonl"]


def test_readers_do_not_disturb(inbox):
    with inbox.drop("x.jsonl").open("rb"):
        assert inbox.settled() == ["x.jsonl"]


def test_looking_does_not_keep_a_writer_out(inbox):
    """The lease that asks for writers is given back at once."""
    path = inbox.drop("x.jsonl")
    assert inbox.settled() == ["x.jsonl"]
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_where_the_kernel_does_not_tell_about_writers_the_window_is_longer(inbox):
    path = inbox.drop("x.jsonl")
    path.chmod(0o644)
    os.chown(path, 12345, 12345)

    def look() -> list[float]:
        inbox.look()
        pauses = [inbox.look(after=after).again for after in (2.1, 2.7)]
        assert inbox.ready(after=0.4) == ["x.jsonl"]
        return pauses

    assert without_privileges(look) == pytest.approx([2.9, 0.2])


# -- files that are not whole


@pytest.mark.parametrize("tail", [b'{"mess', b"{", b'{"a": "\xc3', b"["])
def test_half_a_last_line_waits_and_is_given_up_in_the_end(inbox, tail):
    path = inbox.drop("x.jsonl", LINE + tail)
    inbox.look()
    look = inbox.look(after=10)
    assert (look.ready, look.waiting) == ([], [path])
    assert look.again == pytest.approx(50)
    assert inbox.ready(after=49) == []
    assert inbox.ready(after=2) == ["x.jsonl"]


def test_a_last_line_that_is_completed_in_time_is_ready(inbox):
    path = inbox.drop("x.jsonl", LINE + LINE[:5])
    inbox.look()
    inbox.look(after=30)
    with path.open("ab") as file:
        file.write(LINE[5:])
    assert inbox.settled() == ["x.jsonl"]


@pytest.mark.parametrize("content", [LINE.rstrip(), LINE + LINE.rstrip(), LINE + b"nonsense\n", b"\n"])
def test_a_last_line_that_is_whole_or_ended_does_not_wait(inbox, content):
    inbox.drop("x.jsonl", content)
    assert inbox.settled() == ["x.jsonl"]


def test_a_last_line_that_no_parser_can_take_in_ends_nothing(inbox):
    inbox.drop("x.jsonl", LINE + b"[" * 200_000)
    inbox.drop("y.jsonl")
    assert "y.jsonl" in inbox.settled()


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json"])
def test_other_formats_have_an_end_of_their_own_and_do_not_wait(inbox, name):
    inbox.drop(name, b'{"mess')
    assert inbox.settled() == [name]


def test_an_empty_file_waits_and_is_given_up_in_the_end(inbox):
    path = inbox.drop("x.jsonl", b"")
    inbox.look()
    look = inbox.look(after=100)
    assert (look.ready, look.waiting, look.complaints) == ([], [path], [])
    assert look.again == pytest.approx(3500)
    assert inbox.ready(after=3400) == []
    assert inbox.ready(after=101) == ["x.jsonl"]


def test_an_empty_file_that_is_filled_is_ready_soon(inbox):
    inbox.drop("x.jsonl", b"")
    inbox.look()
    inbox.look(after=100)
    inbox.drop("x.jsonl")
    assert inbox.settled() == ["x.jsonl"]


# -- what is none of our business

LITTER = [
    ".x.jsonl",
    ".x.jsonl.Ab3dE9",
    "#x.jsonl#",
    "x.jsonl~",
    "x.jsonl.tmp",
    "x.jsonl.temp",
    "x.jsonl.part",
    "x.jsonl.partial",
    "x.jsonl.filepart",
    "x.jsonl.crdownload",
    "x.jsonl.download",
    ".x.jsonl.swp",
    "x.jsonl.swx",
    "x.jsonl.lock",
    "X.JSONL.PART",
    ".DS_Store",
    "Thumbs.db",
    ".gitkeep",
]


@pytest.mark.parametrize("name", LITTER)
def test_litter_is_passed_over_without_a_word(inbox, name):
    inbox.drop(name)
    assert inbox.settled() == []
    assert inbox.look() == Look([], [], [], None)


def test_folders_of_litter_are_passed_over_too(inbox):
    for name in ("@eaDir", ".sync"):
        inbox.drop(f"{name}/x.jsonl")
    assert inbox.look() == Look([], [], [], None)


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x", "x.jsonl.bz2", "x.json.gz", "x.gz", "jsonl", "x.jsonll"])
def test_an_unknown_extension_is_complained_about_once(inbox, name):
    path = inbox.drop(name)
    complaint = inbox.complaint()
    assert complaint.path == path
    assert ".jsonl" in complaint.remedy


def test_a_symbolic_link_is_complained_about_once_and_stays(inbox, tmp_path):
    (tmp_path / "elsewhere.jsonl").write_bytes(LINE)
    link = inbox.folder / "x.jsonl"
    link.symlink_to(tmp_path / "elsewhere.jsonl")
    assert "symbolic link" in inbox.complaint().what
    assert link.is_symlink()


def test_a_dangling_link_is_complained_about_once(inbox):
    (inbox.folder / "x.jsonl").symlink_to("nowhere")
    assert "symbolic link" in inbox.complaint().what


def test_a_fifo_does_not_stop_the_daemon(inbox):
    os.mkfifo(inbox.folder / "x.jsonl")
    assert "not a regular file" in inbox.complaint().what


def test_a_socket_does_not_stop_the_daemon(inbox, monkeypatch):
    monkeypatch.chdir(inbox.folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x.jsonl")
        assert inbox.complaint().path.name == "x.jsonl"


def test_a_link_to_a_folder_is_not_followed(inbox, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.jsonl").write_bytes(LINE)
    (inbox.folder / "fast").symlink_to(tmp_path / "other")
    assert inbox.complaint().path == inbox.folder / "fast"


@pytest.mark.parametrize("name", ["slow", "x.jsonl"])
def test_a_folder_that_is_no_profile_is_complained_about_once(inbox, name):
    inbox.drop(f"{name}/y.jsonl")
    complaint = inbox.complaint()
    assert repr(name) in complaint.what
    assert "fast" in complaint.remedy


def test_an_empty_folder_is_nothing_to_complain_about(inbox):
    (inbox.folder / "slow").mkdir()
    assert inbox.look() == Look([], [], [], None)


def test_a_file_that_may_not_be_read_is_complained_about_once_with_owner_and_mode(inbox):
    path = inbox.drop("x.jsonl")
    path.chmod(0o000)
    complaint = without_privileges(inbox.complaint)
    assert "owner" in complaint.what
    assert "0000" in complaint.what
    assert str(path) in complaint.remedy


def test_a_file_that_becomes_readable_is_ready_after_its_window(inbox):
    path = inbox.drop("x.jsonl")
    path.chmod(0o000)
    without_privileges(inbox.look)
    path.chmod(0o600)
    assert without_privileges(inbox.settled) == ["x.jsonl"]


@pytest.mark.parametrize("name", ["fast", "slow"])
def test_a_folder_that_may_not_be_listed_is_complained_about_once_and_stops_nothing(inbox, name):
    inbox.drop("x.jsonl")
    inbox.drop(f"{name}/y.jsonl")
    (inbox.folder / name).chmod(0o000)

    def look() -> list[Look]:
        return [inbox.look(), inbox.look(after=10)]

    try:
        first, second = without_privileges(look)
    finally:
        (inbox.folder / name).chmod(0o700)
    assert [complaint.path for complaint in first.complaints] == [inbox.folder / name]
    assert [found.path.name for found in second.ready] == ["x.jsonl"]
    assert second.complaints == []


def test_what_went_away_and_came_back_is_complained_about_again(inbox):
    path = inbox.drop("x.csv")
    assert len(inbox.look().complaints) == 1
    path.unlink()
    inbox.look()
    inbox.drop("x.csv")
    assert len(inbox.look().complaints) == 1


def test_a_complaint_that_changes_is_made_again(inbox):
    path = inbox.folder / "x.jsonl"
    path.symlink_to("nowhere")
    inbox.look()
    path.unlink()
    os.mkfifo(path)
    assert [complaint.what for complaint in inbox.look().complaints] == ["is not a regular file"]


def test_a_complaint_does_not_keep_others_waiting(inbox):
    (inbox.folder / "a.jsonl").symlink_to("nowhere")
    inbox.drop("b.jsonl")
    assert inbox.settled() == ["b.jsonl"]


def test_an_inbox_that_is_gone_is_complained_about_and_found_again(inbox):
    inbox.folder.rmdir()
    assert [complaint.path for complaint in inbox.look().complaints] == [inbox.folder]
    inbox.folder.mkdir()
    inbox.drop("x.jsonl")
    assert inbox.settled() == ["x.jsonl"]


# -- profiles


def test_files_in_a_profiles_folder_belong_to_it(inbox):
    inbox.drop("x.jsonl")
    path = inbox.drop("fast/x.jsonl")
    inbox.look()
    ready = inbox.look(after=3).ready
    assert sorted(ready, key=lambda found: found.profile) == [Found(inbox.folder / "x.jsonl", ""), Found(path, "fast")]


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "fast/deeper", "{tmp}/other"])
def test_a_profiles_name_cannot_lead_out_of_the_inbox(inbox, tmp_path, name):
    for folder in (tmp_path / "other", tmp_path, inbox.folder / "fast" / "deeper"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x.jsonl").write_bytes(LINE)
    inbox.drop("y.jsonl")
    config = CONFIG.model_copy(update={"profiles": {name.format(tmp=tmp_path): {}}})
    inbox.look(config=config)
    assert inbox.ready(after=3, config=config) == ["y.jsonl"]


def test_a_profile_that_is_added_to_the_config_is_found(inbox):
    inbox.drop("slow/x.jsonl")
    assert inbox.settled() == []
    config = CONFIG.model_copy(update={"profiles": {"slow": {}}})
    inbox.look(config=config)
    assert inbox.ready(after=3, config=config) == ["x.jsonl"]


def test_a_folder_in_a_profiles_folder_is_complained_about_once(inbox):
    (inbox.folder / "fast" / "deeper").mkdir(parents=True)
    (inbox.folder / "fast" / "deeper" / "x.jsonl").write_bytes(LINE)
    assert inbox.complaint().path == inbox.folder / "fast" / "deeper"


# -- overrides


@pytest.mark.parametrize(
    ("data", "override"),
    [
        ("x.jsonl", "x.config.json"),
        ("x.jsonl.gz", "x.config.json"),
        ("x.jsonl.zst", "x.config.json"),
        ("x.json", "x.config.json"),
        ("X.JSONL", "X.config.json"),
        ("a.b c.jsonl", "a.b c.config.json"),
        ("é.jsonl", "é.config.json"),
        (b"\xff.jsonl", b"\xff.config.json"),
        ("config.json", "config.config.json"),
    ],
)
def test_the_override_of_a_file_has_its_stem(inbox, data, override):
    path = inbox.folder / os.fsdecode(data)
    assert Found(path, "").override == inbox.folder / os.fsdecode(override)


@pytest.mark.parametrize("data", ["x.jsonl", "x.jsonl.gz", b"x\xff.jsonl"])
def test_an_override_is_never_data_and_beside_its_data_no_complaint(inbox, data):
    found = Found(inbox.drop(data), "")
    found.override.write_bytes(b"{}")
    first = inbox.look()
    look = inbox.look(after=10)
    assert first.complaints == look.complaints == []
    assert look.ready == [found]


def test_settings_that_are_still_written_hold_their_data_back(inbox):
    inbox.drop("x.jsonl")
    assert inbox.settled() == ["x.jsonl"]
    with inbox.drop("x.config.json", b"{").open("ab") as writer:
        assert inbox.ready() == []
        assert inbox.ready(after=10) == []
        writer.write(b"}")
    assert inbox.ready(after=10) == []
    assert inbox.ready(after=10) == ["x.jsonl"]


def test_an_override_without_data_is_complained_about_once(inbox):
    inbox.drop("x.config.json", b"{}")
    inbox.drop("y.jsonl")
    first = inbox.look()
    assert [(one.path.name, one.what) for one in first.complaints] == [
        ("x.config.json", "waits for a data file of its name")
    ]
    assert inbox.look(after=10).complaints == []


def test_an_override_in_a_profiles_folder_belongs_to_the_data_there(inbox):
    inbox.drop("fast/x.config.json", b"{}")
    inbox.drop("x.jsonl")
    assert [one.path.parent.name for one in inbox.look().complaints] == ["fast"]


# -- held-out files


@pytest.mark.parametrize(
    ("data", "held_out"),
    [
        ("x.jsonl", "x.eval.jsonl"),
        ("x.jsonl.gz", "x.eval.json"),
        ("x.json", "x.eval.jsonl.zst"),
        ("X.JSONL", "X.EVAL.JSONL"),
        ("a.b c.jsonl", "a.b c.eval.jsonl"),
        (b"\xff.jsonl", b"\xff.eval.jsonl"),
        ("fast/x.jsonl", "fast/x.eval.jsonl"),
        ("eval.jsonl", "eval.eval.jsonl"),
    ],
)
def test_a_held_out_file_is_taken_with_the_data_of_its_stem_and_never_alone(inbox, data, held_out):
    beside = inbox.drop(held_out)
    found = Found(inbox.drop(data), "fast" if "fast" in str(data) else "", beside)
    first = inbox.look()
    look = inbox.look(after=10)
    assert first.complaints == look.complaints == []
    assert look.ready == [found]


@pytest.mark.parametrize(
    "name", ["x.eval.jsonl", "x.eval.json", "x.eval.jsonl.gz", "X.EVAL.JSONL", "fast/x.eval.jsonl"]
)
def test_a_held_out_file_without_data_waits_for_it(inbox, name):
    path = inbox.drop(name)
    inbox.drop("x.eval.config.json", b"{}")
    look = inbox.look()
    assert {one.path.name for one in look.complaints} == {path.name, "x.eval.config.json"}, "nor has it settings"
    [complaint] = [one for one in look.complaints if one.path == path]
    assert complaint.what == "is held-out data by its name and waits for its data file"
    assert "Drop x.jsonl too" in complaint.remedy.replace("X", "x")
    assert inbox.look(after=10_000).ready == []
    inbox.drop(name.replace(".eval", "").replace(".EVAL", ""))
    assert len(inbox.settled()) == 1


@pytest.mark.parametrize("name", ["eval.jsonl", "xeval.jsonl", "x.evaluation.jsonl", "x.eval.v2.jsonl"])
def test_a_name_that_only_looks_like_that_of_held_out_data_is_data(inbox, name):
    inbox.drop(name)
    assert inbox.settled() == [name]


@pytest.mark.parametrize("litter", [".x.eval.jsonl", "x.eval.jsonl.part", "y.eval.jsonl", "x.eval.txt"])
def test_other_things_are_not_the_held_out_file(inbox, litter):
    path = inbox.drop("x.jsonl")
    inbox.drop(litter)
    (inbox.folder / "x.eval.json").mkdir()
    inbox.look()
    assert inbox.look(after=10).ready == [Found(path, "")]


def test_of_several_held_out_files_one_must_go_before_anything_is_taken(inbox):
    path = inbox.drop("x.jsonl")
    inbox.drop("x.eval.jsonl")
    other = inbox.drop("x.eval.json", b"[]")
    inbox.drop("y.jsonl")
    [complaint] = inbox.look().complaints
    assert (complaint.path, complaint.what) == (path, "has several held-out files: x.eval.json, x.eval.jsonl")
    assert inbox.ready(after=10) == ["y.jsonl"]
    other.unlink()
    assert inbox.settled() == ["x.jsonl", "y.jsonl"]


def test_a_held_out_file_to_which_two_data_files_lay_claim_is_taken_with_neither(inbox):
    inbox.drop("x.eval.jsonl")
    inbox.drop("x.jsonl")
    other = inbox.drop("x.json", b"[]")
    complaints = inbox.look().complaints
    assert [one.path.name for one in complaints] == ["x.json", "x.jsonl"]
    assert all("x.eval.jsonl may belong: x.json, x.jsonl" in one.what for one in complaints)
    assert inbox.ready(after=10) == []
    other.unlink()
    assert inbox.settled() == ["x.jsonl"]


def test_a_held_out_file_that_is_not_quiet_holds_its_data_back(inbox):
    inbox.drop("x.jsonl")
    assert inbox.settled() == ["x.jsonl"]
    inbox.drop("x.eval.jsonl")
    assert inbox.ready() == []
    assert inbox.ready(after=1.5) == []
    assert inbox.ready(after=1) == ["x.jsonl"]


def test_a_held_out_file_that_is_open_for_writing_holds_its_data_back(inbox):
    inbox.drop("x.jsonl")
    with inbox.drop("x.eval.jsonl").open("ab"):
        inbox.look()
        assert inbox.ready(after=10) == []
    assert inbox.ready(after=10) == ["x.jsonl"]


def test_a_held_out_file_with_half_a_line_is_given_time(inbox):
    inbox.drop("x.jsonl")
    inbox.drop("x.eval.jsonl", LINE + b'{"mess')
    inbox.look()
    assert inbox.ready(after=50) == []
    assert inbox.ready(after=20) == ["x.jsonl"]


def test_an_empty_held_out_file_is_given_time(inbox):
    inbox.drop("x.jsonl")
    inbox.drop("x.eval.jsonl", b"")
    inbox.look()
    assert inbox.ready(after=3000) == []
    assert inbox.ready(after=1000) == ["x.jsonl"]


def test_a_held_out_file_that_cannot_be_taken_keeps_its_data_with_a_complaint(inbox):
    inbox.drop("x.jsonl")
    link = inbox.folder / "x.eval.jsonl"
    link.symlink_to("nowhere")
    complaint = inbox.complaint()
    assert (complaint.path, complaint.what) == (link, "is a symbolic link")


@pytest.mark.parametrize("which", ["x.jsonl", "x.eval.jsonl"])
def test_a_pair_that_changed_since_the_look_is_not_as_seen(inbox, which):
    inbox.drop("x.jsonl")
    inbox.drop("x.eval.jsonl")
    inbox.look()
    [found] = inbox.look(after=10).ready
    assert inbox.settler.is_as_seen(found)
    with (inbox.folder / which).open("ab") as file:
        file.write(LINE)
    assert not inbox.settler.is_as_seen(found)


@pytest.fixture(autouse=True)
def _no_descriptor_left_open() -> Iterator[None]:
    """Looking goes on for months: a descriptor a look would be the end of it."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_folder_on_nfs_is_known_by_the_table_of_mounts(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:45 / /shared rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2\n"
    )
    assert is_nfs(os.makedev(0, 45), mounts)
    assert not is_nfs(os.makedev(8, 1), mounts)
    assert not is_nfs(os.makedev(9, 9), mounts)
    assert not is_nfs(tmp_path.stat().st_dev)
