"""Flat and padded micro-batches against the model as transformers runs it, one row at a time."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetuned.trainer import attention, loss
from finetuned.trainer.attention import FLAT
from finetuned.trainer.batches import Batch, collate_padded
from finetuned.trainer.layout import choose_layout, rows_stand_alone
from finetuned.trainer.model import set_checkpointing
from finetuned.trainer.recipes.sft import Objective
from finetuned.trainer.tokens import Example

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LENGTHS = (23, 9, 31, 4)  # tokens of the rows; some are longer than
WINDOW = {"sliding_window": 16}  # this one, which is longer than any row that the layout is tried out on
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

FLAT_FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, **MIXED}),
    "qwen3": ("qwen3", {}),
    "mistral with a window": ("mistral", WINDOW),
    "gemma3 with a window": ("gemma3_text", MIXED),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3 with a window": ("phi3", WINDOW),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
}
ANY_LAYOUT = {
    "qwen3 moe": ("qwen3_moe", {"num_experts": 4, "decoder_sparse_step": 1, **EXPERTS}),
    "phimoe, which tells its window to the mask alone": ("phimoe", {"num_local_experts": 2, **WINDOW}),
    "gemma2, whose attention is capped": ("gemma2", MIXED),
    "gpt-oss, whose attention has sinks": ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 2, **MIXED}),
}
WITH_STATE = {
    "mamba": ("mamba", {"state_size": 4, "conv_kernel": 3}),
    "lfm2, with convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "qwen3 next, with linear attention": (
        "qwen3_next",
        {
            "num_experts": 2,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            **EXPERTS,
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices as small as these are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, extra: dict):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **extra})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return model.train()


def rows(lengths: Sequence[int] = LENGTHS, seed: int = 3, shared: int = 0) -> list[Example]:
    """Random rows; the first `shared` tokens are the same in all."""
    chance = torch.Generator().manual_seed(seed)
    start = torch.randint(3, SIZES["vocab_size"], (shared,), generator=chance).tolist()
    return [
        Example(
            start + torch.randint(3, SIZES["vocab_size"], (length - shared,), generator=chance).tolist(),
            torch.rand(length, generator=chance).gt(0.4).tolist(),
            0,
        )
        for length in lengths
    ]


def run(model, loss) -> tuple[float, dict[str, torch.Tensor]]:
    """A loss and the gradient of everything."""
    model.zero_grad()
    value = loss()
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(model, examples: list[Example]) -> torch.Tensor:
    """The summed loss by transformers' own forward, one row at a time."""
    total = torch.zeros(())
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0, :-1]
        learned = torch.tensor(example.supervised[1:])
        targets = torch.tensor(example.ids[1:])[learned]
        total = total + torch.nn.functional.cross_entropy(logits[learned].float(), targets, reduction="sum")
    return total


def assert_same(found, wanted) -> None:
    """Losses and gradients agree to 1e-5 of the largest gradient of each parameter."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    ceiling = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        error = float((found[1][name] - gradient).abs().max())
        assert error <= 1e-5 * ceiling, f"{name}: {error}"


def check_every_way(model, layout, examples: list[Example] | None = None) -> None:
    objective, examples = Objective(model, layout), examples or rows()
    chosen = run(model, lambda: objective(layout.collate(examples)))
    alone = run(model, lambda: sum(objective(layout.collate([example])) for example in examples))
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    padded = run(model, lambda: objective(collate_padded(examples)))
    wanted = run(model, lambda: plain_loss(model, examples))
    for found in (chosen, alone, padded):
        assert_same(found, wanted)


@pytest.mark.parametrize(("family", "extra"), FLAT_FAMILIES.values(), ids=FLAT_FAMILIES)
def test_these_families_are_trained_flat_and_right(family, extra):
    model = build(family, extra)
    layout = choose_layout(model, torch.float32)
    assert layout.flat, layout.reason
    assert model.config._attn_implementation == FLAT
    check_every_way(model, layout)


ALIKE = (20, 19, 18, 31, 30, 13, 12)  # tokens of rows that meet in groups


@pytest.mark.parametrize("short", [0, 24, 128], ids="plain products up to {} keys".format)
@pytest.mark.parametrize("shared", [0, 9, 11], ids="{} shared tokens".format)
@pytest.mark.parametrize("name", FLAT_FAMILIES)
def test_rows_in_groups_and_what_they_share_come_out_right(name, shared, short, monkeypatch):
    """What rows begin with is computed once, and rows of like length together, by products or by torch's kernel."""
    monkeypatch.setattr(attention, "_SHORT", short)
    model = build(*FLAT_FAMILIES[name])
    examples = rows(ALIKE, shared=shared)
    layout = choose_layout(model, torch.float32)
    flat = layout.collate(examples).inputs
    assert flat["input_ids"].shape[1] == sum(ALIKE) - shared * (len(ALIKE) - 1)
    assert flat["flat_rows"].shared == shared
    check_every_way(model, layout, examples)


def test_nothing_is_shared_where_the_layout_says_so():
    model = build("llama", {})
    layout = choose_layout(model, torch.float32, share=False)
    assert layout.collate(rows(ALIKE, shared=11)).inputs["input_ids"].shape[1] == sum(ALIKE)


@pytest.mark.parametrize(("family", "extra"), ANY_LAYOUT.values(), ids=ANY_LAYOUT)
def test_whatever_is_chosen_for_these_families_is_right(family, extra):
    model = build(family, extra)
    check_every_way(model, choose_layout(model, torch.float32))


@pytest.mark.parametrize(("family", "extra"), WITH_STATE.values(), ids=WITH_STATE)
def test_a_model_with_a_state_across_tokens_is_never_flat(family, extra):
    model = build(family, extra)
    layout = choose_layout(model, torch.float32)
    assert not layout.flat
    assert layout.reason
    assert model.config._attn_implementation != FLAT
    check_every_way(model, layout)


def test_a_model_that_scales_its_logits_is_trained_on_them():
    """Its head alone would give another loss."""
    model = build("granite", {"logits_scaling": 2.0})
    layout = choose_layout(model, torch.float32)
    assert layout.flat
    assert not layout.head_apart
    check_every_way(model, layout)


def capping(dtype: torch.dtype = torch.float32):
    model = build("gemma2", {"final_logit_softcapping": 3.0, **MIXED})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that the cap is felt
    return model.to(dtype)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("chunk", [4, 1000], ids="{} positions at once".format)
def test_a_model_that_caps_its_logits_is_trained_on_them_chunk_by_chunk(chunk, frozen, monkeypatch):
    monkeypatch.setitem(loss._CHUNK, "cpu", 4 * SIZES["vocab_size"] * chunk)
    model = capping()
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    layout = choose_layout(model, torch.float32)
    assert layout.head_apart
    check_every_way(model, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cap_is_seen_in_any_number_format(dtype):
    model = capping(dtype)
    layout = choose_layout(model, dtype)
    hidden, head = layout.hidden_states(model, layout.collate(rows()))
    assert head(hidden).abs().max() <= 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_the_head_alone_gives_other_logits_the_model_s_own_are_taken(dtype):
    """Also where they differ by less than bf16's rounding in all layers does."""
    layout = choose_layout(build("granite", {"logits_scaling": 1.01}).to(dtype), dtype)
    assert not layout.head_apart


def test_rows_longer_than_a_model_was_made_for_stand_alone_where_the_longest_scales_all():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    model = build("phi3", {"rope_parameters": rope, "original_max_position_embeddings": 24})
    assert not rows_stand_alone(model, 24)
    assert rows_stand_alone(model, 25)
    assert not rows_stand_alone(build("llama", {}), 1000)


def test_activation_checkpointing_keeps_less():
    model = build("llama", {})

    def kept(*, on: bool) -> int:
        sizes = []
        set_checkpointing(model, on=on)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            run(model, lambda: plain_loss(model, rows()))
        return sum(sizes)

    everything = kept(on=False)
    assert kept(on=True) < everything / 2
    assert kept(on=False) == everything


def test_the_trial_leaves_the_model_as_it_was():
    model = build("llama", {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    choose_layout(model, torch.float32)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def muted(example: Example) -> Example:
    return replace(example, supervised=[False] * len(example.ids))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", FLAT_FAMILIES)
def test_no_row_of_a_flat_batch_sees_another(name, place):
    """Other rows before and behind change nothing of a row's loss, to the last bit, nor of its gradient."""
    model = build(*FLAT_FAMILIES[name])
    layout = choose_layout(model, torch.float32)
    objective = Objective(model, layout)
    (row,) = rows((19,))
    embedding = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)

    def among(seed: int) -> Batch:
        neighbours = [muted(example) for example in rows((23, 8), seed)]
        return layout.collate([*neighbours[:place], row, *neighbours[place:]])

    first, second = (run(model, lambda seed=seed: objective(among(seed))) for seed in (5, 6))
    assert first[0] == second[0]
    others = [token for token in range(SIZES["vocab_size"]) if token not in row.ids]
    for _, gradients in (first, second):
        assert not gradients[embedding][others].any()  # nothing reaches the neighbours' tokens
        assert gradients[embedding][row.ids].any()
