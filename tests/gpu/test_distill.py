"""Distillation on a GPU: number formats that meet there, and a teacher on another device than its student."""

import math

import pytest
import torch

from conftest import chat_rows, write_jsonl
from finetuned.events import EventType, ExitCode
from finetuned.trainer.distill.terms import Projector
from test_distill import ALL_TERMS, ROWS, make_other_model, settings, tokenizers
from test_training import Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return make_other_model(tmp_path_factory.mktemp("other-model"))


@pytest.fixture
def job(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(24))
    held_out = write_jsonl(tmp_path / "held-out.jsonl", chat_rows(6, start=100))
    asking = {"eval_file": str(held_out), "eval_steps": 2, "predictions": {"enabled": False}}

    def make(teacher, **values) -> Run:
        own = {"model": str(tiny_model), "teacher": str(teacher), "learning_rate": 2e-3, **asking, **values}
        return Run(tmp_path / "job", data, recipe="distill", distill=ALL_TERMS, **own)

    return make


@pytest.mark.parametrize("teacher_device", ["cuda", "cpu"])
@pytest.mark.parametrize("teacher_dtype", ["fp16", "bf16", "float32", "4bit"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float32"])
@pytest.mark.parametrize("other", [False, True])
def test_any_teacher_teaches_any_student(  # noqa: PLR0917, pytest passes fixtures by name
    job, tiny_model, other_model, other, dtype, teacher_dtype, teacher_device
):
    """The crash was a float16 teacher: mat1 and mat2 must have the same dtype."""
    values = {"dtype": dtype, "teacher_dtype": teacher_dtype, "teacher_device": teacher_device, "tuning": "lora"}
    run = job(other_model if other else tiny_model, **values)
    assert run.attempt() == ExitCode.DONE, run.log[-3000:]
    (result,) = run.events(EventType.RESULT)
    assert result.data["valid_loss"] < result.data["valid_loss_before"]
    for step in run.steps()[3 if dtype == "fp16" else 0 :]:
        assert all(math.isfinite(step[f"grad_norm_{term}"]) for term in ("labels", "teacher", "hidden", "projector"))


@pytest.mark.parametrize("tuning", ["qlora", "full"])
def test_every_tuning_learns_from_a_teacher_in_four_bits(job, other_model, tuning):
    run = job(other_model, tuning=tuning, teacher_dtype="4bit")
    assert run.attempt() == ExitCode.DONE, run.log[-3000:]


@pytest.mark.parametrize("teacher_dtype", ["fp16", "bf16", "float32"])
def test_autocast_changes_no_bit_of_what_is_taught(tiny_model, other_model, teacher_dtype):
    from finetuned.trainer.distill.found import find_teacher
    from finetuned.trainer.distill.teacher import Teacher

    own = settings(model=str(tiny_model), teacher=str(other_model), teacher_dtype=teacher_dtype)
    teacher = Teacher(find_teacher(own, tokenizers(tiny_model)[0], models=tiny_model, base_dir=tiny_model))
    teacher.load(torch.device("cuda"))
    projector = Projector(teacher.width, 16, torch.Generator().manual_seed(0)).cuda()

    def taught() -> torch.Tensor:
        found: torch.Tensor = projector(teacher.read(ROWS).hidden)
        return found

    plain = taught()
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(taught(), plain, rtol=0, atol=0)
