"""Changes on disk: whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetuned.durable import make_folder, move, sync_file, sync_tree, write_file


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let the kernel refuse to write on, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The names of what was fsynced, in order; it is fsynced all the same."""
    names: list[str] = []
    real: Callable[[int], None] = os.fsync

    def fsync(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written(tmp_path):
    write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert inside(tmp_path) == ["x"]
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) & 0o007 == 0


def test_a_shorter_content_takes_the_place_of_a_longer_one(tmp_path):
    (tmp_path / "x").write_bytes(b"old and long")
    write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_who_has_the_old_file_open_keeps_the_old_content(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with (tmp_path / "x").open("rb") as reader:
        write_file(tmp_path / "x", b"new")
        assert reader.read() == b"old"


def test_a_full_disk_half_way_leaves_the_old_content(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with no_file_larger_than(1000), pytest.raises(OSError) as caught:
        write_file(tmp_path / "x", b"n" * 100_000)
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "x").read_bytes() == b"old"
    write_file(tmp_path / "x", b"new")
    assert inside(tmp_path) == ["x"]


def test_a_failed_fsync_leaves_the_old_content(tmp_path, monkeypatch):
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError):
        write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_content_that_is_no_bytes_leaves_the_old_content(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(TypeError):
        write_file(tmp_path / "x", "text")  # type: ignore[arg-type]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "nowhere" / "x", b"new")
    assert inside(tmp_path) == []


def test_a_temporary_file_left_by_a_crash_does_not_disturb(tmp_path):
    with pytest.raises(TypeError):
        write_file(tmp_path / "x", "a long text left by a crash")  # type: ignore[arg-type]
    for path in tmp_path.iterdir():
        path.write_bytes(b"a long content left by a crash")
    write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_the_content_is_durable_before_its_name_and_the_name_before_the_return(tmp_path, synced, monkeypatch):
    replace = os.replace

    def replacing(*args: object, **kwargs: object) -> None:
        synced.append("<rename>")
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", replacing)
    write_file(tmp_path / "x", b"new")
    assert len(synced) == 3
    assert "x" in synced[0]
    assert synced[1:] == ["<rename>", tmp_path.name]


def test_a_move_is_durable_at_the_target_first_and_then_at_the_source(tmp_path, synced):
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "x").write_bytes(b"content")
    move(tmp_path / "source" / "x", tmp_path / "target" / "y")
    assert (tmp_path / "target" / "y").read_bytes() == b"content"
    assert inside(tmp_path / "source") == []
    assert synced == ["target", "source"]


def test_a_move_within_a_folder_syncs_it_once(tmp_path, synced):
    (tmp_path / "x").touch()
    move(tmp_path / "x", tmp_path / "y")
    assert synced == [tmp_path.name]


def test_a_name_that_a_power_loss_left_in_both_places_is_moved_again_into_one(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "x").write_bytes(b"content")
    (tmp_path / "to" / "x").hardlink_to(tmp_path / "x")
    move(tmp_path / "x", tmp_path / "to" / "x")
    assert (tmp_path / "to" / "x").read_bytes() == b"content"
    assert inside(tmp_path) == ["to"]


def test_a_folder_is_moved_with_all_that_is_in_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"content")
    (tmp_path / "to").mkdir()
    move(tmp_path / "a", tmp_path / "to" / "a")
    assert (tmp_path / "to" / "a" / "b" / "x").read_bytes() == b"content"


def test_a_move_to_a_folder_that_is_not_there_leaves_the_file(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "x", tmp_path / "nowhere" / "x")
    assert (tmp_path / "x").read_bytes() == b"content"


def test_folders_are_made_each_durable_in_its_parent(tmp_path, synced):
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [tmp_path.name, "a", "b"]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError):
        make_folder(tmp_path / "a")
    with pytest.raises(OSError):
        make_folder(tmp_path / "a" / "b")


def test_a_tree_is_made_durable_from_the_inside_out(tmp_path, synced):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").touch()
    (tmp_path / "a" / "b" / "y").touch()
    sync_tree(tmp_path / "a")
    assert sorted(synced) == ["a", "b", "x", "y"]
    assert synced.index("y") < synced.index("b") < synced.index("a")
    assert synced.index("x") < synced.index("a")


def test_a_file_that_may_only_be_read_can_be_made_durable(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    (tmp_path / "x").chmod(0o400)
    sync_file(tmp_path / "x")
