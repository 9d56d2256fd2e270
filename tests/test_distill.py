"""Recipe distill from outside: what is refused before a model is loaded, what a training tells, and that the teacher's
number format and vocabulary are its own.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import CHATML, chat_rows, write_config, write_jsonl
from finetuned.config import Config, check_overrides, resolve, settings_from
from finetuned.errors import ConfigError, ModelError
from finetuned.events import EventType, ExitCode
from finetuned.trainer.distill.alignment import Aligner, letters_of
from finetuned.trainer.distill.curriculum import value
from finetuned.trainer.distill.found import find_teacher
from finetuned.trainer.distill.teacher import Teacher
from finetuned.trainer.distill.terms import Projector, attention_loss, contrastive_loss, hidden_loss
from finetuned.trainer.tokens import Example
from test_training import Run

SIZES = {"hidden_size": 192, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 6}
ALL_TERMS = {
    "alpha": [0.2, 0.8], "temperature": [3, 1], "hidden_weight": 0.1, "attention_weight": [0, 0.1],
    "contrastive_weight": 0.1, "norm_steps": 1,
}  # fmt: skip
TEXTS = [
    "Say the number 7 please. The number is 7. Indeed.",
    "naïve 漢字 — 🎉 and 'quoted'  spaces,\n\tlines\n\n",
    "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\nIt.<|im_end|>\n",
]


def make_other_model(folder: Path, *, trim: bool = True) -> Path:
    """A random Llama with words of its own: byte-level BPE with merges, other marks, and a mark at each beginning."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [turn["content"] for row in chat_rows(40) for turn in row["messages"]] + TEXTS
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.post_processor = Sequence([ByteLevel(trim_offsets=trim), begins])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, **SIZES)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    return make_other_model(tmp_path_factory.mktemp("other-model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", chat_rows(24))


# ---------------------------------------------------------------- settings


def settings(**values):
    return settings_from({"recipe": "distill", "teacher": "smollm2-135m", **values}, where="the test")


def test_the_recipe_needs_a_teacher():
    with pytest.raises(ConfigError, match="recipe distill needs a teacher"):
        settings_from({"recipe": "distill"}, where="the test")


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"alpha": 0}, "all weights of the teacher are 0"),
        ({"alpha": [0, 0, 1]}, "is 0 twice in a row"),
        ({"alpha": 1.5}, "must be at most 1 or a list, not 1.5"),
        ({"temperature": 0}, "must be more than 0 or a list, not 0"),
        ({"hidden_layers": [[0, 1]]}, "must be at least 1, not 0"),
    ],
)
def test_what_could_teach_nothing_is_refused(distill, said):
    with pytest.raises(ConfigError, match=said):
        settings(distill=distill)


def test_an_override_may_not_name_a_folder_as_the_teacher():
    check_overrides({"teacher": "HuggingFaceTB/SmolLM2-135M"}, where="x")
    for folder in ("/etc", "../up", "./here"):
        with pytest.raises(ConfigError, match="may not name a folder as its teacher"):
            check_overrides({"teacher": folder}, where="x")


def test_an_override_may_not_choose_whose_code_is_run():
    with pytest.raises(ConfigError, match="trust_remote_code"):
        resolve(Config(trust_remote_code=True), "", {"teacher": "somebody/model"})


def test_a_course_runs_evenly_from_its_first_value_to_its_last():
    assert [value(0.5, step, 5) for step in range(5)] == [0.5] * 5
    assert [value([0.0, 1.0], step, 5) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [value([4, 2, 1], step, 5) for step in range(5)] == [4, 3, 2, 1.5, 1]
    assert value([3, 1], 0, 1) == 3


# ---------------------------------------------------------------- where two tokenizers meet


def tokenizers(*folders: Path) -> list[PreTrainedTokenizerFast]:
    return [AutoTokenizer.from_pretrained(folder) for folder in folders]


@pytest.mark.parametrize("text", TEXTS)
def test_every_token_s_letters_add_up_to_the_text(tiny_model, other_model, text):
    for tokenizer in tokenizers(tiny_model, other_model):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(piece or "" for piece in letters_of(tokenizer.backend_tokenizer, ids)) == text


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("turned", [False, True])
def test_where_tokens_are_matched_both_have_read_the_same_text(tmp_path, tiny_model, text, trim, turned):
    both = tokenizers(tiny_model, make_other_model(tmp_path, trim=trim))
    student, teacher = reversed(both) if turned else both
    ids = student(text, add_special_tokens=False)["input_ids"]
    row = Example(ids, [place >= 4 for place in range(len(ids))], 1)
    aligned = Aligner(student, teacher)(row)

    wanted = range(4, len(ids))
    marks = {student.eos_token: teacher.eos_token, student.bos_token: teacher.bos_token}

    def read(tokenizer, of: list[int]) -> str:
        found = tokenizer.decode(of, skip_special_tokens=False)
        for mine, theirs in marks.items():
            found = found.replace(theirs, mine)
        return found

    tokens = [place for place, is_it in enumerate(aligned.places.supervised) if is_it]
    assert len(tokens) == len(aligned.matched) > 0
    begun = "" if turned or text.startswith("<|im_start|>") else student.bos_token
    for token, number in zip(tokens, aligned.matched, strict=True):
        assert read(teacher, aligned.places.ids[:token]) == begun + read(student, ids[: wanted[number]])
    share = len(aligned.matched) / len(wanted)
    assert share > 0.9 if turned and text is TEXTS[0] else share > 0.2


def test_what_the_teacher_is_measured_on_is_the_text_of_the_targets(tiny_model, other_model):
    student, teacher = tokenizers(tiny_model, other_model)
    text = TEXTS[0]
    start = text.index("The number")
    ids = student(text, add_special_tokens=False)["input_ids"]
    row = Example(ids, [place >= start for place in range(len(ids))], 1)  # a byte is a token here
    covered = Aligner(student, teacher)(row).covered
    learned = [number for number, is_it in zip(covered.ids, covered.supervised, strict=True) if is_it]
    assert teacher.decode(learned).strip() == text[start:].strip()


def test_a_tokenizer_matches_itself_everywhere(other_model):
    (tokenizer,) = tokenizers(other_model)
    ids = tokenizer(TEXTS[0])["input_ids"]
    aligned = Aligner(tokenizer, tokenizer)(Example(ids, [True] * len(ids), 1))
    assert aligned.places.ids == ids
    assert aligned.matched == list(range(len(ids) - 1))


# ---------------------------------------------------------------- the teacher


def teacher_of(model: Path, teacher: Path, **values) -> Teacher:
    own = settings(model=str(model), teacher=str(teacher), **values)
    base = find_teacher(own, tokenizers(model)[0], models=model, base_dir=model)
    found = Teacher(base)
    found.load(torch.device("cpu"))
    return found


ROWS = [Example([0, *range(20, 60)], [False] * 10 + [True] * 31, 1), Example([0, *range(30, 45)], [True] * 16, 2)]


@pytest.mark.parametrize("teacher_dtype", ["fp16", "bf16", "float32", "4bit"])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("mixed", [None, torch.bfloat16, torch.float16])
def test_a_teacher_of_any_number_format_teaches_whatever_autocast_is_on(
    tiny_model, other_model, teacher_dtype, other, mixed
):
    """The crash was a float16 teacher on a CPU: mat1 and mat2 must have the same dtype. Autocast changes no bit."""
    if teacher_dtype == "4bit":
        pytest.importorskip("bitsandbytes")
    teacher = teacher_of(tiny_model, other_model if other else tiny_model, teacher_dtype=teacher_dtype)
    projector = Projector(teacher.width, 16, torch.Generator().manual_seed(0))

    def taught() -> list[torch.Tensor]:
        lesson = teacher.read(ROWS, layers=[1], attention=[2])
        own = torch.arange(len(lesson.hidden) * 64, dtype=torch.float32).reshape(-1, 64).sin()
        other_way = Projector(64, teacher.width, torch.Generator().manual_seed(0))
        heads = (4, teacher.model.config.num_attention_heads)
        losses = [
            hidden_loss(own, lesson.layers[1], other_way),
            contrastive_loss(own, lesson.layers[1], lesson.counts, other_way, temperature=0.1),
            attention_loss(own, lesson.attention[2, "q_proj"], lesson.counts, heads),
        ]
        return [projector(lesson.hidden), lesson.head(lesson.hidden).float(), *losses]

    plain = taught()
    with torch.autocast("cpu", mixed, enabled=mixed is not None):
        found = taught()
    assert all(tensor.isfinite().all() for tensor in plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


def test_a_teacher_that_is_not_there_is_told_by_name(tmp_path, tiny_model):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    faults = ("nowhere", "no such folder"), (".", "no model in this folder"), ("adapter", "holds an adapter, not a")
    for folder, said in ((tmp_path / name, said) for name, said in faults):
        with pytest.raises(ModelError, match=f"teacher .*{said}"):
            teacher_of(tiny_model, folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"teacher .*no weights in safetensors"):
        teacher_of(tiny_model, tmp_path)


def test_a_device_that_is_not_there_is_told(tiny_model):
    with pytest.raises(ConfigError, match="there is no cuda:7"):
        teacher_of(tiny_model, tiny_model, teacher_device="cuda:7")


def test_a_teacher_with_more_tokens_speaks_the_student_s_language_and_one_with_fewer_does_not(tmp_path, tiny_model):
    larger = tmp_path / "larger"
    shutil.copytree(tiny_model, larger)
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(larger)
    model = AutoModelForCausalLM.from_pretrained(larger)
    model.resize_token_embeddings(len(tokenizer) + 5)
    model.save_pretrained(larger)
    assert teacher_of(tiny_model, larger).same_vocabulary
    assert not teacher_of(larger, tiny_model).same_vocabulary


# ---------------------------------------------------------------- the other terms


def test_relations_are_compared_whatever_the_numbers_of_heads():
    """A model whose heads are split further has other relations only where heads are told apart."""
    torch.manual_seed(0)
    states = torch.randn(9, 24)
    assert attention_loss(states, states, [5, 4], (6, 4)) == 0
    assert attention_loss(states, torch.randn(9, 36), [5, 4], (6, 4)) > 0


@pytest.mark.parametrize("counts", [[9], [5, 4], [0, 5, 0, 4], [1] * 9])
def test_rows_do_not_see_each_other(counts):
    torch.manual_seed(0)
    mine, theirs, projector = torch.randn(9, 8), torch.randn(9, 12), Projector(8, 12, torch.Generator().manual_seed(0))

    def losses(mine, theirs, counts):
        return torch.stack(
            [
                hidden_loss(mine, theirs, projector),
                attention_loss(mine, theirs, counts, (2, 4)),
                contrastive_loss(mine, theirs, counts, projector, temperature=0.2),
            ]
        )

    parts = [
        losses(*part) for part in zip(mine.split(counts), theirs.split(counts), [[n] for n in counts], strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), losses(mine, theirs, counts))


def test_each_term_has_its_least_where_the_student_is_like_its_teacher():
    torch.manual_seed(0)
    states, projector = torch.randn(9, 8), Projector(8, 8, torch.Generator().manual_seed(0))
    projector.weight.data = torch.eye(8)
    assert hidden_loss(3 * states, states, projector) < 1e-4
    assert contrastive_loss(states, states, [9], projector, temperature=0.05) < 0.1
    assert contrastive_loss(states.flip(0), states, [9], projector, temperature=0.05) > 10


# ---------------------------------------------------------------- a whole training


@pytest.fixture
def job(tmp_path, data, tiny_model):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", chat_rows(6, start=100))
    asking = {"eval_file": str(held_out), "eval_steps": 2, "predictions": {"enabled": False}}

    def make(teacher: Path, **values) -> Run:
        own = {"model": str(tiny_model), "teacher": str(teacher), "tuning": "lora", **asking, **values}
        return Run(tmp_path / "job", data, recipe="distill", **own)

    return make


def test_a_training_tells_each_term_with_its_gradient_and_what_was_retained(job, tiny_model, tmp_path, data):
    """The teacher is the same model, which was taught the answers before."""
    taught = Run(tmp_path / "taught", data, model=str(tiny_model), tuning="full", epochs=12, learning_rate=5e-3).done()
    run = job(taught.adapter, distill=ALL_TERMS | {"temperature": [3, 1]}, epochs=4, learning_rate=1e-2).done()
    steps = run.steps()
    for step in steps:
        for term in ("labels", "teacher", "hidden", "contrastive"):
            assert step[f"loss_{term}"] > 0
            assert step[f"grad_norm_{term}"] > 0
        assert step["grad_norm_projector"] > 0
    assert [round(step["alpha"], 4) for step in (steps[0], steps[-1])] == [0.2, 0.8]
    assert [step["temperature"] for step in (steps[0], steps[-1])] == [3, 1]
    assert "loss_attention" not in steps[0]
    assert steps[-1]["loss_attention"] > 0
    first = steps[0]
    weights = {"labels": 0.8, "teacher": 0.2, "hidden": 0.1, "contrastive": 0.1}
    assert first["train_loss"] == pytest.approx(sum(w * first[f"loss_{term}"] for term, w in weights.items()), rel=1e-4)

    (result,) = run.events(EventType.RESULT)
    told = result.data
    assert told["teacher_valid_loss"] < told["valid_loss_before"] - 1
    gain = told["valid_loss_before"] - told["teacher_valid_loss"]
    assert told["retained"] == pytest.approx((told["valid_loss_before"] - told["valid_loss"]) / gain)
    evaluated = [e.data for e in run.events(EventType.METRICS) if "valid_loss" in e.data]
    assert evaluated[0]["retained"] == 0
    assert evaluated[-1]["retained"] > 0.05
    story = json.loads((run.adapter / "finetuned.json").read_text())
    assert story["metrics"]["teacher"].endswith("(the same vocabulary)")
    assert story["metrics"]["retained"] == told["retained"]


def test_the_teacher_s_held_out_loss_is_its_own(job, other_model, tmp_path):
    """By its own tokens, over the same text, a target of the student."""
    run = job(other_model, max_steps=1).done()
    (told,) = {e.data["teacher_valid_loss"] for e in run.events(EventType.METRICS) if "valid_loss" in e.data}
    student, teacher = tokenizers(run.spec.settings["model"], other_model)
    model = AutoModelForCausalLM.from_pretrained(other_model)
    total, targets = 0.0, 0
    for row in chat_rows(6, start=100):
        turns = [{"role": "system", "content": "You are a helpful assistant."}, *row["messages"]]
        answer = turns[-1]["content"] + "</s>"
        text = student.apply_chat_template(turns, tokenize=False)
        text = text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
        ids = teacher(text, add_special_tokens=False)["input_ids"]
        behind = len(teacher(text[text.rindex(answer) :], add_special_tokens=False)["input_ids"])
        learned = behind - 1  # but the line end behind the answer's mark
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logs[at - 1, ids[at]]) for at in range(len(ids) - behind, len(ids) - behind + learned))
        targets += len(student(turns[-1]["content"])["input_ids"]) + 1
    assert told == pytest.approx(total / targets, rel=1e-3)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_teacher_of_another_vocabulary_teaches_through_the_projector(job, other_model, tuning):
    run = job(other_model, distill=ALL_TERMS, tuning=tuning, dtype="bf16", teacher_dtype="fp16", epochs=1).done()
    for step in run.steps():
        assert step["loss_projector"] > 0
        assert step["loss_teacher"] > 0
        assert step["grad_norm_projector"] > 0
        assert 0.1 < step["matched"] < 0.9
    assert all("projector" not in name and "teacher" not in name for name in run.weights())


def test_checkpoints_hold_projectors_and_nothing_of_the_teacher(job, other_model):
    from safetensors.torch import load_file

    run = job(other_model, distill=ALL_TERMS, checkpoint_steps=2).done()
    (newest, *_) = sorted(run.folder.checkpoints.glob("step-*"), reverse=True)
    weights = load_file(newest / "trained.safetensors")
    beside = {name for name in weights if "lora_" not in name}
    assert len(beside) == 1 + 2 + 1  # into the head, for two layers of the student, contrastive
    assert all(name.startswith("projectors.") for name in beside)
    assert {weights[name].dtype for name in beside} == {torch.float32}


def test_a_missing_teacher_ends_the_job_before_the_model_is_loaded(job, tmp_path):
    run = job(tmp_path / "nowhere")
    assert run.attempt() == ExitCode.BAD_SETTINGS
    assert "teacher" in run.error()["where"]
    assert "loading" not in run.log


def test_a_layer_that_is_not_there_is_told(job, tiny_model):
    run = job(tiny_model, distill={"hidden_weight": 1, "hidden_layers": [[1, 3]]})
    assert run.attempt() == ExitCode.BAD_SETTINGS
    assert "the teacher has 2 layers" in run.error()["what"]


def test_a_teacher_that_says_nothing_new_is_left_out_of_the_figures(job, tiny_model):
    """The student itself: there is no gain of which a share could be retained."""
    run = job(tiny_model, max_steps=2, distill={"norm_steps": None}).done()
    (result,) = run.events(EventType.RESULT)
    assert result.data["teacher_valid_loss"] == pytest.approx(result.data["valid_loss_before"], rel=1e-4)
    assert math.isclose(run.steps()[0]["loss_teacher"], 0.0, abs_tol=1e-5)
    assert "grad_norm_teacher" not in run.steps()[0]


# ---------------------------------------------------------------- finetuned check


def check(home, data: Path) -> tuple[int, dict]:
    command = [sys.executable, "-m", "finetuned", "check", str(data), "--base-dir", str(home.root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    return done.returncode, json.loads(done.stdout)


def test_check_names_the_teacher_and_whether_it_speaks_in_the_student_s_tokens(home, data, tiny_model, other_model):
    for teacher, which in ((tiny_model, "the same"), (other_model, "another")):
        write_config(home, model=str(tiny_model), recipe="distill", teacher=str(teacher))
        code, said = check(home, data)
        assert code == 0
        assert said["teacher"] == f"{teacher} ({which} vocabulary)"


def test_check_refuses_a_job_whose_teacher_is_not_there(home, data, tiny_model, tmp_path):
    write_config(home, model=str(tiny_model), recipe="distill", teacher=str(tmp_path / "nowhere"))
    code, said = check(home, data)
    assert code == 1
    assert said["verdict"] == "refused"
    assert "teacher" in said["reason"]["where"]
    assert said["rows"] == 24


@pytest.mark.parametrize("vocabulary", ["the same", "another"])
def test_rows_that_a_teacher_was_not_made_for_are_told_before_it_is_loaded(
    home, data, tiny_model, other_model, vocabulary
):
    teacher = home.root / "teacher"
    shutil.copytree(tiny_model if vocabulary == "the same" else other_model, teacher)
    facts = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": 60}))
    write_config(home, model=str(tiny_model), recipe="distill", teacher=str(teacher))
    code, facts = check(home, data)
    found = facts["warnings"]["beyond_reach"]
    assert (code, found["lines"]) == (0, [1, 2, 3])
    assert f"the teacher {teacher} was made for 60" in found["detail"]
    longest = int(re.search(r"the longest has (\d+) tokens", found["detail"])[1])
    assert (longest == facts["tokens"]["lengths"]["longest"]) is (vocabulary == "the same")

    own = {"model": str(tiny_model), "teacher": str(teacher), "fail_on": ["beyond_reach"]}
    run = Run(home.root / "job", data, recipe="distill", **own)
    assert run.attempt() == ExitCode.BAD_DATA
    assert "loading_model" not in [event.data.get("phase") for event in run.events()]


def test_no_teacher_is_looked_for_without_the_recipe(tiny_model, tmp_path):
    own = settings_from({"teacher": str(tmp_path / "nowhere")}, where="the test")
    assert find_teacher(own, tokenizers(tiny_model)[0], models=tmp_path, base_dir=tmp_path) is None


def test_the_tokenizer_of_a_hub_teacher_out_of_reach_is_a_wait_and_no_end(tiny_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        teacher_of(tiny_model, Path("nobody/nothing"))
    assert caught.value.code == "hub_unreachable"
    assert caught.value.where.startswith("teacher ")
