"""Trainings that could not teach anything are named at once, each by really breaking something."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import chat_rows
from finetuned.config import settings_from
from finetuned.dataset.formats import check_row
from finetuned.errors import ConfigError, ModelError, UnhealthyError
from finetuned.events import EventType, parse_event
from finetuned.trainer import loop
from finetuned.trainer.base import Base
from finetuned.trainer.ends import StopAskedError
from finetuned.trainer.health import Watch, check_step, check_trainable
from finetuned.trainer.loop import Task, train
from finetuned.trainer.recipes.sft import Objective
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.tokens import tokenise


@pytest.fixture
def training(tmp_path, tiny_model, monkeypatch):
    """Train in this process: `training(model=..., **settings)`."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # which the trainer hides as well, but for good

    def start(
        model: Path = tiny_model, *, asked_to_stop=lambda: False, rows=None, spoil=lambda examples: examples, **settings
    ):
        settings = settings_from(
            {"dtype": "float32", "tuning": "lora", "epochs": 10, "predictions": {"samples": 0}, **settings},
            where="the test",
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        rows = [check_row(number, row)[1] for number, row in enumerate(rows or chat_rows(16))]
        examples = spoil(list(tokenise(rows, tokenizer, max_length=200)))
        return train(
            Task(
                settings=settings,
                rung=settings.first_rung(),
                base=Base(str(model), str(model)),
                tokenizer=tokenizer,
                train=examples,
                held_out=examples[: settings.predictions.samples],
                asked=rows[: settings.predictions.samples],
                device=torch.device("cpu"),
                checkpoints=tmp_path / "checkpoints",
                bounds=tmp_path / "micro-batches.json",
                say=Reporter(tmp_path / "events.jsonl"),
                asked_to_stop=asked_to_stop,
            )
        )

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


def told(folder: Path, kind: EventType) -> list:
    events = [parse_event(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    return [event for event in events if event.type is kind]


def steps_done(folder: Path) -> int:
    """Steps that were taken: one that is skipped has no figures."""
    return sum("train_loss" in event.data for event in told(folder, EventType.METRICS))


def skipped(folder: Path) -> list[str]:
    return [event.message for event in told(folder, EventType.MESSAGE) if "skipped" in event.message]


def test_a_sound_training_passes(training, tmp_path):
    trained = training()
    assert trained.metrics["step"] == steps_done(tmp_path) == 20


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("gemma2", {"sliding_window": 16}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 16}),
    ],
)
def test_a_family_whose_attention_is_not_sdpa_is_trained_and_asked_too(training, tmp_path, tiny_model, family, extra):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = AutoConfig.for_model(
        family, **{"vocab_size": 258, "num_key_value_heads": 2, "head_dim": 8, **sizes, **extra}
    )
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("generation_config.json"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    trained = training(tmp_path / "model", epochs=1, predictions={"samples": 2, "max_new_tokens": 4})
    assert trained.metrics["step"] == 2
    assert trained.metrics["valid_loss"] < trained.metrics["valid_loss_before"]


def test_layers_that_are_not_there_are_named(training):
    with pytest.raises(ConfigError, match="no_such_layer") as caught:
        training(target_modules=["no_such_layer"])
    assert caught.value.where == "target_modules"
    assert "all-linear" in caught.value.remedy


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_learning_rate_that_blows_up_ends_the_training(training, tmp_path, tuning):
    with pytest.raises(UnhealthyError, match=r"nan|inf") as caught:
        training(tuning=tuning, learning_rate=1, weight_decay=1e30, max_grad_norm=0)
    assert caught.value.code in {"loss_not_finite", "gradient_not_finite"}
    assert "learning_rate" in caught.value.remedy
    assert len(skipped(tmp_path)) == 3
    assert caught.value.where == f"step {steps_done(tmp_path) + 3 + 1}"
    assert 1 <= steps_done(tmp_path) < 16


def spoilt(model: Path, folder: Path, spoil) -> Path:
    """A copy of a model with its weights spoilt."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_that_cannot_reach_the_answer_is_told_at_the_first_step(training, tmp_path, tiny_model):
    """Queries that no output listens to: there is a loss, but nothing flows back to the adapter."""

    def deafen(weights: dict) -> None:
        for name, weight in weights.items():
            if "o_proj" in name:
                weight.zero_()

    model = spoilt(tiny_model, tmp_path / "model", deafen)
    with pytest.raises(UnhealthyError, match="gradient is exactly zero") as caught:
        training(model, target_modules=["q_proj"])
    assert caught.value.code == "gradient_zero"
    assert caught.value.where == "step 1"
    assert steps_done(tmp_path) == 0


def test_weights_that_are_not_numbers_are_told_at_the_first_step(training, tmp_path, tiny_model):
    model = spoilt(tiny_model, tmp_path / "model", lambda weights: weights["model.norm.weight"].fill_(math.nan))
    with pytest.raises(ModelError, match="not numbers"):
        training(model)
    assert told(tmp_path, EventType.PLAN) == []


# ---------------------------------------------------------------- before the first step


def test_nothing_to_train_is_told(training, monkeypatch, tmp_path):
    """An adapter beside which nothing is trainable is one case, a frozen model another."""
    whole = loop.load_model

    def frozen(*arguments, **options):
        model = whole(*arguments, **options)
        return model.requires_grad_(requires_grad=False)

    monkeypatch.setattr(loop, "load_model", frozen)
    with pytest.raises(UnhealthyError, match="no parameter") as caught:
        training(tuning="full")
    assert caught.value.code == "nothing_trainable"
    check_trainable([("weight", torch.nn.Parameter(torch.ones(1)))])


def test_an_adapter_that_loads_frozen_is_told(training, tmp_path, tiny_model):
    """`inference_mode` in a saved adapter is true, and peft loads it so unless told otherwise."""
    from peft import PeftModel

    training(epochs=1).model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["inference_mode"] is True
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    check_trainable(PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).named_parameters())

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    model.get_input_embeddings().requires_grad_()  # that something else trains does not make up for it
    with pytest.raises(UnhealthyError, match="adapter is frozen") as caught:
        check_trainable(model.named_parameters())
    assert caught.value.code == "adapter_frozen"
    assert "is_trainable=True" in caught.value.remedy


def test_a_step_whose_every_token_is_masked_is_told(training, tmp_path):
    """Rows that are masked as a whole are refused before; here they get through, two of them in a step alone."""

    def mask(examples):
        silent = loop.steps.plan_steps(16, effective_batch=2, epochs=1, max_steps=None, seed=42).step(3)
        return [
            replace(example, supervised=[False] * len(example.ids)) if row in silent else example
            for row, example in enumerate(examples)
        ]

    with pytest.raises(UnhealthyError, match="masked") as caught:
        training(spoil=mask, batch_size=2, epochs=1)
    assert (caught.value.code, caught.value.where) == ("nothing_supervised", "step 4")
    assert steps_done(tmp_path) == 0
    training(spoil=mask, batch_size=8, epochs=1)  # beside other rows they do no harm


def test_a_learning_rate_that_never_moves_a_weight_is_told_before_the_first_step(training, tmp_path):
    with pytest.raises(UnhealthyError, match="zero at every step") as caught:
        training(learning_rate=1e-50)
    assert (caught.value.code, caught.value.where) == ("learning_rate_zero", "learning_rate")
    assert steps_done(tmp_path) == 0


def test_the_start_line_says_what_will_be_done(training, tmp_path):
    training(epochs=1)
    (plan,) = told(tmp_path, EventType.PLAN)
    assert plan.data["trainable_parameters"] == 32_768
    assert plan.data["parameters"] == 139_840
    assert plan.data["method"] == "lora"
    assert plan.data["micro_batch"]["rows"] == 8
    assert 100 < plan.data["micro_batch"]["tokens"] < plan.data["tokens"]
    for said in (
        "2 steps of 8 rows",
        f"at most 8 rows and {plan.data['micro_batch']['tokens']} tokens",
        "lora: 32,768 of 139,840 parameters trainable",
        f"of which {plan.data['supervised_tokens']} supervised",
        "base in float32, trained in float32, computed in float32",
        "attention finetuned_flat",
    ):
        assert said in plan.message


# ---------------------------------------------------------------- at a step


def with_gradients(monkeypatch, change) -> None:
    """Let the gradient of everything that is trained be changed on its way: `change(step, gradient)`, steps from 1."""
    plain = loop.add_adapter
    begun = []

    def hooked(*arguments, **options):
        model = plain(*arguments, **options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: change(len(begun), gradient))
        return model

    counted = loop.Training.step
    monkeypatch.setattr(loop.Training, "step", lambda self: (begun.append(1), counted(self)))
    monkeypatch.setattr(loop, "add_adapter", hooked)


@pytest.mark.parametrize("factor", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("from_step", [1, 5])
def test_a_gradient_of_nothing_is_told(training, monkeypatch, tmp_path, factor, from_step):
    with_gradients(monkeypatch, lambda step, gradient: gradient * factor if step >= from_step else gradient)
    with pytest.raises(UnhealthyError, match="gradient is") as caught:
        training()
    assert caught.value.code == ("gradient_zero" if factor == 0.0 else "gradient_not_finite")
    assert steps_done(tmp_path) == from_step - 1
    # At step 1 nothing was learned yet, and a zero is no accident: neither is skipped.
    assert len(skipped(tmp_path)) == (0 if from_step == 1 or factor == 0.0 else 3)


def test_a_loss_that_is_no_number_at_step_1_ends_the_job_at_once(training, monkeypatch, tmp_path):
    plain = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: plain(self, batch) * math.inf)
    with pytest.raises(UnhealthyError, match="loss is inf") as caught:
        training()
    assert (caught.value.code, caught.value.where) == ("loss_not_finite", "step 1")
    assert skipped(tmp_path) == []


def test_a_loss_of_exactly_zero_is_told(training, monkeypatch):
    """Nothing is summed up, as if every label were masked on its way to the loss."""
    monkeypatch.setattr(
        "finetuned.trainer.recipes.sft.summed_loss", lambda hidden, head, targets: head(hidden[:0]).sum()
    )
    with pytest.raises(UnhealthyError, match="exactly zero") as caught:
        training()
    assert (caught.value.code, caught.value.where) == ("loss_zero", "step 1")


def test_weights_that_the_optimizer_does_not_move_are_told(training, monkeypatch, tmp_path):
    """It holds copies, as after a module was moved or replaced behind its back."""
    plain = torch.optim.AdamW

    def copies(groups: list[dict], **options) -> torch.optim.AdamW:
        return plain([{"params": [p.detach().clone() for p in group["params"]]} for group in groups], **options)

    monkeypatch.setattr(torch.optim, "AdamW", copies)
    with pytest.raises(UnhealthyError, match="no weight changed") as caught:
        training()
    assert caught.value.code == "weights_unchanged"
    assert steps_done(tmp_path) == 0


def test_a_learning_rate_below_the_weights_resolution_is_told(training):
    with pytest.raises(UnhealthyError, match="no weight changed") as caught:
        training(tuning="full", learning_rate=1e-30)
    assert (caught.value.code, caught.value.where) == ("weights_unchanged", "learning_rate")


# ---------------------------------------------------------------- in fp16


def test_a_gradient_scaler_may_skip_steps_while_it_looks_for_its_scale(training, monkeypatch, tmp_path):
    with_gradients(monkeypatch, lambda step, gradient: gradient * math.inf if step <= 3 else gradient)
    trained = training(dtype="fp16")
    assert skipped(tmp_path) == []
    assert trained.metrics["step"] == 20
    assert trained.metrics["train_loss"] < told(tmp_path, EventType.METRICS)[3].data["train_loss"] - 0.1


def test_a_gradient_scale_that_collapses_is_told(training, monkeypatch, tmp_path):
    with_gradients(monkeypatch, lambda _, gradient: gradient * math.inf)
    with pytest.raises(UnhealthyError, match=r"scale fell to 0\.5") as caught:
        training(dtype="fp16")
    assert (caught.value.code, caught.value.where) == ("scale_collapsed", "step 18")  # 2**16 halved 17 times
    assert "bf16" in caught.value.remedy


def test_a_training_of_which_every_step_was_skipped_is_no_success(training, monkeypatch):
    with_gradients(monkeypatch, lambda _, gradient: gradient * math.inf)
    with pytest.raises(UnhealthyError, match="every step was skipped") as caught:
        training(dtype="fp16", max_steps=4)
    assert caught.value.code == "weights_unchanged"


# ---------------------------------------------------------------- steps that are skipped


@pytest.fixture
def poisoned(tmp_path, tiny_model) -> tuple[Path, list[dict]]:
    """A model of which one letter's embedding is no number, and rows of which one has it: seen in steps 2, 3 and 6."""
    letter = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("~")
    model = spoilt(tiny_model, tmp_path / "model", lambda w: w["model.embed_tokens.weight"][letter].fill_(math.nan))
    rows = chat_rows(16)
    rows[loop.steps.plan_steps(16, effective_batch=8, epochs=1, max_steps=None, seed=42).step(1)[0]] = {
        "messages": [{"role": "user", "content": "a ~"}, {"role": "assistant", "content": "b"}]
    }
    return model, rows


def test_a_bad_step_is_skipped_with_a_warning_and_changes_no_weight(training, tmp_path, poisoned):
    model, rows = poisoned
    trained = training(model, rows=rows, epochs=2)
    first, second = skipped(tmp_path)
    assert first.startswith("step 2 is skipped, 1 of at most 3: the loss is nan")
    assert second.startswith("step 3 is skipped, 2 of at most 3: the loss is nan")
    poisoned_line = next(number for number, row in enumerate(rows) if "~" in row["messages"][0]["content"])
    lines = re.search(r"lines ([\d, ]+)", first)[1].split(", ")
    assert str(poisoned_line) in lines
    assert len(lines) == 8
    assert trained.metrics["step"] == 4
    assert trained.metrics["skipped_steps"] == 2
    assert [event.data["step"] for event in told(tmp_path, EventType.METRICS)] == [1, 4]
    assert all(p.isfinite().all() for name, p in trained.model.named_parameters() if "lora_" in name)


def test_one_bad_step_too_many_ends_the_training(training, tmp_path, poisoned):
    model, rows = poisoned
    with pytest.raises(UnhealthyError, match="loss is nan") as caught:
        training(model, rows=rows, epochs=10, skip_bad_steps=2, checkpoint_steps=1, keep_checkpoints=10)
    assert (caught.value.code, caught.value.where) == ("loss_not_finite", "step 6")  # after 2 and 3
    assert len(skipped(tmp_path)) == 2
    # The weights after step 5 gave the bad loss. Between skipped steps nothing is written.
    assert "step 4's, is kept" in caught.value.remedy
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4", "5"]


@pytest.mark.parametrize("stop_after", [2, 3])
def test_skipped_steps_are_remembered_over_a_stop(training, tmp_path, poisoned, stop_after):
    model, rows = poisoned

    def weights(trained):
        return {name: p.detach().clone() for name, p in trained.model.named_parameters() if "lora_" in name}

    options = {"rows": rows, "epochs": 3, "lora_dropout": 0.1}
    whole = training(model, **options)
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    calls = iter(range(100))
    with pytest.raises(StopAskedError):
        training(model, asked_to_stop=lambda: next(calls) == stop_after, **options)
    resumed = training(model, **options)
    wanted, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert resumed.metrics["skipped_steps"] == whole.metrics["skipped_steps"] == 3
    shutil.rmtree(tmp_path / "checkpoints")
    calls = iter(range(100))
    with pytest.raises(StopAskedError):
        training(model, asked_to_stop=lambda: next(calls) == stop_after, skip_bad_steps=2, **options)
    with pytest.raises(UnhealthyError) as caught:  # or the count would begin again
        training(model, skip_bad_steps=2, **options)
    assert caught.value.where == "step 6"


def test_a_loss_that_explodes_ends_at_the_last_good_checkpoint(training, tmp_path):
    """The learning rate rises until the weights are thrown far off."""
    settings = {"tuning": "full", "learning_rate": 4, "warmup_ratio": 1, "max_grad_norm": 0}
    with pytest.raises(UnhealthyError, match="loss exploded") as caught:
        training(**settings, epochs=100, checkpoint_steps=5)
    assert caught.value.code == "loss_exploded"
    assert len(skipped(tmp_path)) == 3
    first_bad = steps_done(tmp_path) + 1
    assert caught.value.where == f"step {first_bad + 3}"
    good = max(step for step in range(0, first_bad - 1, 5))
    assert f"step {good}'s" in caught.value.remedy
    assert (tmp_path / "checkpoints" / f"step-{good:08d}").is_dir()


def watch(most_skips: int = 3) -> Watch:
    """A watch that has seen ten good steps, the hardest of a loss of 3 and a norm of 5."""
    found = Watch(most_skips, lambda step: step - 1)
    for number, loss in enumerate([3.0, 2.5, 2.0, 2.2, 1.9, 1.7, 2.1, 1.5, 1.6, 1.4], 1):
        assert found.judge(number, loss, 5.0, scale=None) == ""
    return found


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (5.9, 5.0, ""),  # as hard as fine-tuning gets
        (6.1, 5.0, "loss exploded"),
        (1.4, 499.0, ""),
        (1.4, 501.0, "gradient exploded"),
        (math.nan, 5.0, "loss is nan"),
        (1.4, math.inf, "gradient is inf"),
    ],
)
def test_what_a_bad_step_is(loss, norm, said):
    assert said in watch().judge(11, loss, norm, scale=None)
    assert bool(said) == bool(watch().judge(11, loss, norm, scale=None))


def test_small_figures_do_not_explode():
    """Rows that are known already have a loss of nearly nothing, and anything is many times that."""
    calm = Watch(0, lambda step: step)
    for number in range(1, 11):
        calm.judge(number, 0.01, 0.001, scale=None)
    assert calm.judge(11, 1.9, 90.0, scale=None) == ""


def test_hard_batches_among_good_ones_do_not_end_a_training():
    """A wrong label in each hundredth row, say. Three are skipped, the others learned from."""
    seen = watch()
    said = [seen.judge(number, 9.0 if number % 100 == 0 else 0.2, 5.0, scale=None) for number in range(11, 2000)]
    assert sum(map(bool, said)) == seen.skipped == 3


def test_a_slow_runaway_does_not_raise_the_bound():
    seen, loss = watch(), 3.0

    def run_away() -> None:
        for number in range(11, 100):
            seen.judge(number, loss * 1.05 ** (number - 10), 5.0, scale=None)

    with pytest.raises(UnhealthyError, match="loss exploded"):
        run_away()


def test_without_skips_the_first_bad_step_ends_the_training():
    with pytest.raises(UnhealthyError, match="loss exploded") as caught:
        watch(0).judge(11, 50.0, 5.0, scale=None)
    assert caught.value.where == "step 11"


@pytest.mark.parametrize(
    ("number", "loss", "grad_norm", "scaled", "sick"),
    [
        (1, 2.5, 1.0, False, None),
        (7, 2.5, 1.0, False, None),
        (1, math.nan, 1.0, False, "loss_not_finite"),
        (1, 2.5, math.inf, False, "gradient_not_finite"),
        (1, 2.5, math.inf, True, None),  # the scaler skips the step and lowers its scale
        (1, 0.0, 1.0, False, "loss_zero"),
        (7, 0.0, 0.0, False, None),  # learned by heart
        (1, 2.5, 0.0, False, "gradient_zero"),
        (7, 2.5, 0.0, False, "gradient_zero"),
    ],
)
def test_what_a_step_may_look_like(number, loss, grad_norm, scaled, sick):
    if sick is None:
        check_step(number, loss, grad_norm, scaled=scaled)
        return
    with pytest.raises(UnhealthyError) as caught:
        check_step(number, loss, grad_norm, scaled=scaled)
    assert caught.value.code == sick
    assert caught.value.where == f"step {number}"
    assert caught.value.remedy
