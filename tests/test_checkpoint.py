"""Checkpoints: whole or not there, and never the wrong one."""

import json
import shutil

import pytest
import torch

from finetuned.trainer import checkpoint

PLAN = "24 examples, 8 a step, seed 42"


def state(step: int) -> tuple[dict, dict]:
    """Weights and an optimizer's state that tell their step."""
    weights = {"model.a": torch.full((3, 4), float(step)), "model.b": torch.arange(5.0)}
    return weights, {
        "optimizer": {"state": {0: {"exp_avg": torch.full((3, 4), 0.5 * step), "step": torch.tensor(1.0)}}}
    }


def save(folder, step: int, *, plan: str = PLAN, keep: int = 5, best: int | None = None, **extra):
    weights, optimizer = state(step)
    return checkpoint.save(
        folder,
        step=step,
        plan=plan,
        trained=weights,
        optimizer=optimizer,
        keep=keep,
        best=best,
        extra={"train_loss": 1.5, **extra},
    )


def newest_step(folder, plan: str = PLAN) -> int | None:
    found, _ = checkpoint.newest(folder, plan=plan)
    return found and found.step


def flip_a_byte(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path):
    folder = tmp_path / "not" / "there yet"
    save(folder, 7, note="ü")
    found, passed = checkpoint.newest(folder, plan=PLAN)
    assert (found.step, found.plan, found.extra) == (7, PLAN, {"train_loss": 1.5, "note": "ü"})
    assert passed == []
    weights, optimizer = checkpoint.load(found, device=torch.device("cpu"))
    torch.testing.assert_close((weights, optimizer), state(7), rtol=0, atol=0)


def test_parameters_and_views_are_saved_as_they_are(tmp_path):
    """Also such as are not contiguous."""
    weights = {"transposed": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()), "half": torch.ones(3).bfloat16()}
    checkpoint.save(tmp_path, step=1, plan=PLAN, trained=weights, optimizer={}, keep=1, extra={})
    loaded, _ = checkpoint.load(checkpoint.newest(tmp_path, plan=PLAN)[0], device=torch.device("cpu"))
    assert loaded["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["half"].dtype is torch.bfloat16


def test_a_training_that_has_just_begun_has_none(tmp_path):
    assert checkpoint.newest(tmp_path / "missing", plan=PLAN) == (None, [])
    assert checkpoint.newest(tmp_path, plan=PLAN) == (None, [])


def test_the_newest_is_taken_also_past_ten_and_a_million(tmp_path):
    for step in (9, 10, 99, 1_000_000):
        save(tmp_path, step)
    assert newest_step(tmp_path) == 1_000_000


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
        assert len(list(tmp_path.iterdir())) == min(step, 2)
    assert newest_step(tmp_path) == 5
    shutil.rmtree(tmp_path / "step-00000005")
    assert newest_step(tmp_path) == 4


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, keep=2, best=2 if step > 1 else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000005", "step-00000006"]
    save(tmp_path, 7, keep=2, best=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]


def test_one_step_is_found_or_the_reason_why_not(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_a_byte(tmp_path / "step-00000002" / "optimizer.pt", -1)
    assert checkpoint.of_step(tmp_path, 1, plan=PLAN).step == 1
    assert "damaged" in checkpoint.of_step(tmp_path, 2, plan=PLAN)
    assert "another plan" in checkpoint.of_step(tmp_path, 3, plan="another")
    assert "not whole" in checkpoint.of_step(tmp_path, 4, plan=PLAN)


def test_what_a_crash_left_half_written_is_cleared_at_any_later_step(tmp_path):
    """A resumed training may save at other steps."""
    save(tmp_path, 5).rename(tmp_path / ".step-00000005")
    save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_staged_folder_is_never_picked_nor_in_the_way(tmp_path):
    """What a crash in the middle of saving leaves behind."""
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / ".step-00000002")
    assert checkpoint.newest(tmp_path, plan=PLAN)[0].step == 1
    save(tmp_path, 2)
    assert newest_step(tmp_path) == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("what", ["missing", "empty", "cut", "a list", "no hashes"])
def test_without_a_whole_manifest_it_is_passed_over(tmp_path, what):
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    content = manifest.read_bytes()
    spoilt = json.dumps({key: value for key, value in json.loads(content).items() if key != "files"}).encode()
    manifest.unlink()
    if what != "missing":
        manifest.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2], "a list": b"[]", "no hashes": spoilt}[what]
        )
    found, passed = checkpoint.newest(tmp_path, plan=PLAN)
    assert found.step == 1
    (sentence,) = passed
    assert "step-00000002" in sentence
    assert "not whole" in sentence


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["first byte", "last byte", "cut", "gone"])
def test_a_damaged_file_is_noticed(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip_a_byte(path, 0 if damage == "first byte" else -1)
    found, passed = checkpoint.newest(tmp_path, plan=PLAN)
    assert found.step == 1
    (sentence,) = passed
    assert "step-00000002" in sentence
    assert file in sentence


def test_one_of_another_plan_is_passed_over(tmp_path):
    """Other rows or another batch make other steps."""
    save(tmp_path, 1)
    save(tmp_path, 2, plan="23 examples, 8 a step, seed 42")
    found, passed = checkpoint.newest(tmp_path, plan=PLAN)
    assert found.step == 1
    assert len(passed) == 1
    assert "23 examples" in passed[0]


def test_with_none_that_is_good_there_is_none_and_a_sentence_for_each(tmp_path):
    for step in (1, 2, 3):
        flip_a_byte(save(tmp_path, step) / "optimizer.pt", -1)
    found, passed = checkpoint.newest(tmp_path, plan=PLAN)
    assert found is None
    assert len(passed) == 3


def test_the_same_step_may_be_saved_twice(tmp_path):
    """A stop right after a periodic checkpoint."""
    assert save(tmp_path, 3) == save(tmp_path, 3)
    assert newest_step(tmp_path) == 3


def test_saving_the_step_of_a_damaged_one_replaces_it(tmp_path):
    """It was passed over, so its steps were done again; their result must not be lost again."""
    save(tmp_path, 1)
    flip_a_byte(save(tmp_path, 2) / "trained.safetensors", -1)
    assert newest_step(tmp_path) == 1
    save(tmp_path, 2)
    assert newest_step(tmp_path) == 2


def test_saving_the_step_of_another_plan_replaces_it(tmp_path):
    save(tmp_path, 2, plan="another")
    save(tmp_path, 2)
    assert newest_step(tmp_path) == 2


def test_one_that_was_just_saved_is_kept_whatever_else_lies_there(tmp_path):
    """Later steps of another plan (rows cut shorter, say) must not push it out."""
    for step in (50, 60):
        save(tmp_path, step, plan="another", keep=2)
    save(tmp_path, 10, keep=2)
    assert newest_step(tmp_path) == 10
    save(tmp_path, 20, keep=2)
    assert newest_step(tmp_path) == 20
