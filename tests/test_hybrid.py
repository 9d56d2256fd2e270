"""Recipe hybrid: what it learns from, that its parts learn, and what it leaves behind."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import chat_rows, write_jsonl
from finetuned.adapters import read_adapter
from finetuned.config import settings_from
from finetuned.errors import ConfigError, UnhealthyError
from finetuned.events import EventType, ExitCode
from finetuned.trainer import chatting, contest
from finetuned.trainer.batches import collate_flat, collate_padded
from finetuned.trainer.generate import generating
from finetuned.trainer.layout import choose_layout
from finetuned.trainer.loss import summed_entropy, summed_loss, weighted_loss
from finetuned.trainer.policy import CONTROL, Policy, load_policy, log_probability
from finetuned.trainer.prompted import Prompted, parted
from finetuned.trainer.rollouts import answers
from finetuned.trainer.tokens import Example
from test_exactness import QUIET, SMALL, Job, World, build_world, quick  # noqa: F401, quick is a fixture
from test_training import Run, plain_loss

pytestmark = pytest.mark.filterwarnings("ignore")
LUCK = {"kind": "number", "tolerance": 1e6}  # any number is right, and a model that knows nothing writes some


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model) -> World:
    return build_world(tmp_path_factory.mktemp("model"), tiny_model, SMALL)


def job(folder: Path, world: World, *, judge: dict = LUCK, **settings) -> Job:
    table = {"max_new_tokens": 12, **settings.pop("hybrid", {})}
    return Job(folder, world, recipe="hybrid", judge=judge, hybrid=table, **{**QUIET, **settings})


# -- the loss


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_without_a_weight_for_rewards_it_is_sft(tmp_path, world, tuning):
    """To the last bit, whatever the weight of ambiguity."""
    off = job(tmp_path / "off", world, tuning=tuning, hybrid={"reward_weight": 0.0, "ambiguity": 5.0})
    sft = Job(tmp_path / "sft", world, tuning=tuning, **QUIET)
    off.done(), sft.done()
    torch.testing.assert_close(off.state(), sft.state(), rtol=0, atol=0)
    assert [step["train_loss"] for step in off.attempts[0].steps] == [s["train_loss"] for s in sft.attempts[0].steps]


def test_the_held_out_loss_is_that_of_the_labels(tmp_path, world):
    """With learning off in all but name, hybrid's is sft's."""
    slow = {"learning_rate": 1e-9, "eval_steps": 3, "predictions": {"enabled": False}}
    stories = [job(tmp_path / "hybrid", world, **slow).done(), Job(tmp_path / "sft", world, **{**QUIET, **slow}).done()]
    hybrid, sft = (story.trained.metrics["valid_loss"] for story in stories)
    assert hybrid == pytest.approx(sft, rel=1e-5)


def test_the_loss_is_made_of_its_terms(tmp_path, world):
    """(1 - w) (risk + a * ambiguity) + w RL; with rewards off, the rest shows."""
    never = {"kind": "regex", "pattern": "no model says this"}
    loss = {"reward_weight": 0.4, "ambiguity": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetuned.trainer.parts._PATIENCE", 100)
        story = job(tmp_path, world, judge=never, hybrid=loss).done()
    for step in story.attempts[0].steps:
        assert step["reward"] == 0
        assert step["train_loss"] == pytest.approx(0.6 * (step["loss_risk"] + 0.5 * step["loss_ambiguity"]), rel=1e-5)


def test_losses_in_chunks_are_those_of_plain_torch(monkeypatch):
    monkeypatch.setattr(
        "finetuned.trainer.loss._CHUNK", dict.fromkeys(("cpu", "cuda"), 4 * 50 * 3)
    )  # three positions a chunk
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.nn.Linear(8, 50, bias=False)
    targets, weights = torch.randint(50, (10,)), torch.randn(10)
    log_p = torch.log_softmax(head(hidden) / 0.7, dim=1)
    pairs = [
        (weighted_loss(hidden, head, targets, weights, temperature=0.7), -(log_p[range(10), targets] @ weights)),
        (summed_entropy(hidden, head), torch.distributions.Categorical(logits=head(hidden)).entropy().sum()),
        (weighted_loss(hidden, head, targets, torch.ones(10), temperature=1.0), summed_loss(hidden, head, targets)),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(one, (hidden, head.weight), retain_graph=True) for one in (found, wanted)]
        torch.testing.assert_close(*gradients)


# -- the policy


def test_a_refined_prompt_has_gradient_for_all_that_it_is_made_of():
    torch.manual_seed(0)
    policy = Policy(16, 4, 0.02)
    prompt, control, features = (torch.randn(*shape, requires_grad=True) for shape in ((4, 16), (CONTROL,), (16,)))
    with torch.autocast("cpu", torch.bfloat16):
        refined = policy.refine(prompt, control, features)
    assert refined.dtype is torch.float32
    refined.square().sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in (prompt, control, features))
    assert all(p.grad.abs().sum() > 0 for name, p in policy.named_parameters() if name.startswith(("read", "change")))
    assert (refined - prompt).abs().max() <= 0.5 * 0.02 + 1e-6, "a refinement is small"
    assert policy.refine(prompt[:2], control, features).shape == (2, 16), "a question may be shorter than the prompt"


def test_the_density_of_control_is_that_of_torch():
    control, aim = torch.randn(2, 5, CONTROL)
    normal = torch.distributions.Normal(aim, 1.0).log_prob(control).sum(-1)
    torch.testing.assert_close(log_probability(control, aim) - CONTROL / 2 * math.log(2 * math.pi), normal)


def test_a_policy_is_read_as_it_was_written(tmp_path):
    policy = Policy(16, 4, 0.02)
    torch.nn.init.normal_(policy.aim.weight)
    policy.save(tmp_path)
    prompt, control, features = torch.randn(4, 16), torch.randn(CONTROL), torch.randn(16)
    read = load_policy(tmp_path)
    torch.testing.assert_close(read.refine(prompt, control, features), policy.refine(prompt, control, features))
    torch.testing.assert_close(read(features), policy(features))


# -- what is drawn


@pytest.fixture
def model(world):
    return AutoModelForCausalLM.from_pretrained(world.base.source).eval()


def prompts_of(model, *lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [model.get_input_embeddings()(torch.randint(5, 200, (length,))).detach() for length in lengths]


def test_an_answer_does_not_depend_on_those_beside_it(world, model):
    """Greedy ones are transformers' own, and lots decide about the others."""
    prompts, lots = prompts_of(model, 5, 9, 14), torch.rand(3, 6)
    lots[1] = -1
    with generating(model, world.tokenizer):
        together = answers(model, prompts, lots, temperature=1.0, ends={1})
        alone = [
            answers(model, [prompt], lot[None], temperature=1.0, ends={1})[0]
            for prompt, lot in zip(prompts, lots, strict=True)
        ]
        greedy = model.generate(inputs_embeds=prompts[1][None], max_new_tokens=6, do_sample=False, eos_token_id=1)
    assert together == alone
    assert greedy[0].tolist()[: len(together[1])] == together[1]


def test_lots_draw_each_token_as_often_as_it_is_probable(world, model):
    (prompt,) = prompts_of(model, 7)
    model.get_output_embeddings().weight.data *= 20  # so that there is something to tell
    with torch.no_grad():
        probable = torch.softmax(model(inputs_embeds=prompt[None]).logits[0, -1] / 2.0, dim=0)
    lots = (torch.arange(2000)[:, None] + 0.5) / 2000
    with generating(model, world.tokenizer):
        drawn = torch.tensor(answers(model, [prompt] * 2000, lots, temperature=2.0, ends={1}))
    often = torch.bincount(drawn[:, 0], minlength=len(probable)) / 2000
    assert (often - probable).abs().max() <= 1 / 2000


def test_refined_rows_go_flat_as_they_go_padded(world, model):
    layout = choose_layout(model, torch.float32)
    assert layout.flat
    prompted = Prompted(model, layout)
    rows = world.train[:3]
    prompts = [prompted.prompt(row.ids) + 0.05 for row in rows]
    found = []
    for batch in (collate_flat(rows, share=False), collate_padded(rows)):
        model.set_attn_implementation(layout.attention if "flat_rows" in batch.inputs else "sdpa")
        hidden, _ = prompted.hidden(batch, prompts)
        found.append(hidden.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    embedded = [prompted.embedded(row.ids, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    alone = [model.get_decoder()(inputs_embeds=one[None]).last_hidden_state[0] for one in embedded]
    places = [[n - 1 for n in range(1, len(row.ids)) if row.supervised[n]] for row in rows]
    torch.testing.assert_close(
        found[0], torch.cat([o[p] for o, p in zip(alone, places, strict=True)]).detach(), rtol=1e-4, atol=1e-5
    )


def test_of_several_turns_the_last_answer_is_judged():
    row = Example([1, 2, 3, 4, 5, 6, 7, 8], [False, True, True, False, False, True, True, False], 1)
    assert parted(row) == ([1, 2, 3, 4, 5], [6, 7])


def test_drawing_changes_nothing_else(tmp_path, world, monkeypatch):
    """Random states, modes, attention and padding are as before."""
    real, seen = contest.Contest.draw, []

    def watched(self, rows, step):
        model = self._model
        state = lambda: (  # noqa: E731
            torch.random.get_rng_state().tolist(),
            {name: module.training for name, module in model.named_modules()},
            model.config._attn_implementation,
            model.config.use_cache,
            self._tokenizer.padding_side,
        )
        before = state()
        drawn = real(self, rows, step)
        seen.append(before == state())
        return drawn

    monkeypatch.setattr(contest.Contest, "draw", watched)
    job(tmp_path, world, lora_dropout=0.1).done()
    assert seen
    assert all(seen)


# -- health


@pytest.mark.parametrize("settings", [{}, {"tuning": "full"}, {"hybrid": {"prompt_tokens": 4}}])
def test_every_part_has_a_gradient_and_says_so_from_the_first_step(tmp_path, world, settings):
    story = job(tmp_path, world, **settings).done()
    steps = story.attempts[0].steps
    parts = {"soft_prompt", "policy"} if "hybrid" in settings else {"model", "policy"}
    for step in steps:
        assert {name.removeprefix("grad_norm_") for name in step if name.startswith("grad_norm_")} == parts
    for part in parts:
        assert any(step[f"grad_norm_{part}"] > 0 for step in steps)
    assert math.isclose(steps[0]["grad_norm"], math.hypot(*(steps[0][f"grad_norm_{part}"] for part in parts)))


def test_a_reward_that_is_always_the_same_ends_the_job_by_the_name_of_the_policy(tmp_path, world):
    never = {"kind": "regex", "pattern": "no model says this"}
    with pytest.raises(UnhealthyError, match="gradient of policy has been exactly zero for 10 steps") as caught:
        job(tmp_path, world, judge=never, epochs=4).done()
    assert caught.value.code == "part_gradient_zero"
    assert "reward" in caught.value.remedy


def test_in_fp16_the_scaler_sees_all_parts_once(tmp_path, world):
    """Norms are those of float32, where a part that was unscaled twice, or never, would be off by the scale."""
    steps = {}
    for dtype in ("fp16", "float32"):
        AcceleratorState._reset_state(reset_partial_state=True)
        steps[dtype] = job(tmp_path / dtype, world, dtype=dtype, learning_rate=1e-6).done().attempts[0].steps
    AcceleratorState._reset_state(reset_partial_state=True)
    compared = 0
    for found, wanted in zip(steps["fp16"], steps["float32"], strict=True):
        if math.isfinite(found["grad_norm"]) and found["reward_refined"] == wanted["reward_refined"]:
            compared += bool(wanted["grad_norm_policy"])
            for part in ("grad_norm_model", "grad_norm_policy"):
                assert found[part] == pytest.approx(wanted[part], rel=0.1, abs=1e-4)
    assert compared


# -- what it needs, and what it leaves


def test_a_soft_prompt_goes_with_no_other_adapter():
    for other in ({"tuning": "full"}, {"use_dora": True}, {"resume_adapter": "latest"}):
        with pytest.raises(ConfigError, match=r"hybrid\.prompt_tokens trains a prompt alone"):
            settings_from({"recipe": "hybrid", "hybrid": {"prompt_tokens": 4}, **other}, where="the test")
        settings_from({"hybrid": {"prompt_tokens": 4}, **other}, where="the test")  # another recipe's business


@pytest.mark.parametrize("prompt_tokens", [0, 5], ids=["lora", "soft prompt"])
def test_what_is_saved_works_in_the_libraries_alone(tmp_path, tiny_model, prompt_tokens, monkeypatch):
    """peft loads the adapter with the loss that was measured, and the policy refines its prompts."""
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(16))
    held_out = chat_rows(4, start=100)
    settings = {"prompt_tokens": prompt_tokens, "max_new_tokens": 12}
    run = Run(
        tmp_path / "job",
        data,
        model=str(tiny_model),
        recipe="hybrid",
        judge=LUCK,
        hybrid=settings,
        eval_file=str(write_jsonl(tmp_path / "held-out.jsonl", held_out)),
        predictions={"samples": 1, "max_new_tokens": 4},
        benchmark=str(tmp_path / "held-out.jsonl"),
        benchmark_tokens=4,
    ).done()
    (result,) = run.events(EventType.RESULT)
    assert all(one["error"] is None for event in run.events(EventType.PREDICTIONS) for one in event.data["samples"])
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run.adapter).eval()
    assert model.peft_config["default"].peft_type == ("PROMPT_TUNING" if prompt_tokens else "LORA")
    assert result.data["valid_loss"] < result.data["valid_loss_before"]
    assert result.data["valid_loss"] == pytest.approx(plain_loss(model, tokenizer, held_out), rel=1e-5)

    before, after = json.loads((run.adapter / "finetuned.json").read_text())["benchmark"]["models"]
    assert before["loss"]["value"] == pytest.approx(result.data["valid_loss_before"], abs=2e-2)
    assert after["loss"]["value"] == pytest.approx(result.data["valid_loss"], rel=1e-5)

    policy = load_policy(run.adapter)
    prompt = model.get_prompt(1)[0] if prompt_tokens else model.get_input_embeddings()(torch.arange(5))
    with torch.no_grad():
        refined = policy.refine(prompt, torch.ones(CONTROL), torch.randn(prompt.shape[1]))
    assert refined.shape == prompt.shape
    assert (refined - prompt).abs().max() > 0

    page = (Path(__file__).parents[1] / "docs" / "recipes" / "hybrid.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run.adapter)
    exec(lines, told := {"BASE": str(tiny_model), "QUESTION": "Say the number 3"})
    assert told["refined"].shape == told["plain"].shape
    assert (told["refined"] != told["plain"])[: policy.tokens].any(dim=1).all()
    assert told["answer"].shape[1] > 0

    card = (run.adapter / "README.md").read_text()
    assert ("A soft prompt of 5 tokens" if prompt_tokens else "A LoRA adapter") in card


def test_rows_that_cannot_be_judged_are_bad(tmp_path, tiny_model):
    """A chat must end with an answer that the judge reads; a plain text has none."""
    good = chat_rows(3)
    asked = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Many."}]}
    for rows, line in (([*good, asked], 4), ([{"text": "There are 7 of them."}], 1)):
        data = write_jsonl(tmp_path / f"{line}.jsonl", rows)
        run = Run(
            tmp_path / f"{line}" / "hybrid", data, model=str(tiny_model), recipe="hybrid", judge={"kind": "number"}
        )
        assert run.attempt() == ExitCode.BAD_DATA, run.log
        assert run.error()["code"] == "answer_not_checkable"
        assert run.error()["where"] == f"data.jsonl:{line}"
        Run(tmp_path / f"{line}" / "sft", data, model=str(tiny_model), max_steps=1).done()


def test_one_can_chat_with_a_soft_prompt_and_without_it(tmp_path, tiny_model, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(8))
    table = {"prompt_tokens": 3, "max_new_tokens": 4, "prompt_rate": 500.0}
    settings = {"model": str(tiny_model), "judge": LUCK, "hybrid": table, "max_steps": 2}
    run = Run(tmp_path / "job", data, recipe="hybrid", **settings).done()
    handler = signal.getsignal(signal.SIGINT)
    try:
        heard = chatting.Interrupts()
        for voice in chatting.load(run.adapter, compare=True, model=None, models=tmp_path):
            voice.longest = 6
            voice.answer("Say the number 3", heard)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().out.count("\n") >= 2


def test_a_soft_prompt_is_no_adapter_to_be_merged_or_continued(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match="holds no LoRA adapter"):
        read_adapter(tmp_path, where="finetuned merge")
    assert read_adapter(tmp_path, where="finetuned chat", soft_prompts=True)
