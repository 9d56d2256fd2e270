"""From chat rows to tokens that are learned, and from tokens to micro-batches."""

from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import row_of
from finetuned.dataset.rows import Problem, Row
from finetuned.findings import ERRORS
from finetuned.section_settings import Predictions
from finetuned.trainer.batches import collate_flat, collate_padded
from finetuned.trainer.predictions import predict
from finetuned.trainer.tokens import Example, tokenise

TRIMMING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }} </s>"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
ONLY_LAST = (
    "{% for message in messages %}{% if message['role'] == 'user' or loop.last %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
SHOUTING = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | upper }}<|im_end|>\n{% endfor %}"
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<end_of_turn>\n"
    "{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def chatml(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(tiny_model):
    """One that a test may change."""
    return AutoTokenizer.from_pretrained(tiny_model)


def one(row: Row, tokenizer, *, max_length: int = 10_000):
    """What becomes of a row: an example, or the code of its problem."""
    (result,) = tokenise([row], tokenizer, max_length=max_length)
    if isinstance(result, Example):
        return result
    assert result[0] is row
    assert result[1].code in ERRORS
    return result[1].code


def shown(example: Example, tokenizer) -> str:
    """The row's text with what is learned in «»."""
    pieces = groupby(zip(example.ids, example.supervised, strict=True), key=lambda pair: pair[1])
    texts = [(learned, tokenizer.decode([token for token, _ in pairs])) for learned, pairs in pieces]
    return "".join(f"«{text}»" if learned else text for learned, text in texts)


def chatml_text(messages, *, trim: bool = False) -> str:
    """What ChatML must look like, answers marked: written down without the template."""
    turns = []
    for role, content in messages:
        text = content.strip() if trim else content
        turns.append(
            f"<|im_start|>{role}\n" + (f"«{text}<|im_end|>»\n" if role == "assistant" else f"{text}<|im_end|>\n")
        )
    return "".join(turns)


def test_the_answer_and_its_end_are_learned_and_nothing_else(chatml):
    row = row_of(("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "It is 4."))
    assert shown(one(row, chatml), chatml) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n«It is 4.<|im_end|>»\n"
    )


@pytest.mark.parametrize(
    "answer", ["a", "assistant", "user", "assistant\n", "<|im", "2", " ", "ü", "👩‍👩‍👧", "0", "\n\n"]
)
def test_an_answer_that_occurs_elsewhere_too_is_learned_in_its_own_place(chatml, answer):
    messages = (("user", f"{answer} say a user assistant 2 {answer}"), ("assistant", answer), ("user", answer))
    assert shown(one(row_of(*messages), chatml), chatml) == chatml_text(messages)


def test_every_assistant_turn_is_learned(chatml):
    messages = (
        ("user", "Hello"),
        ("assistant", "Hello"),
        ("user", "Hello again"),
        ("assistant", "again"),
        ("tool", '{"a": 1}'),
        ("assistant", "a is 1"),
    )
    assert shown(one(row_of(*messages), chatml), chatml) == chatml_text(messages)


def test_an_empty_answer_teaches_to_stop(chatml):
    messages = (("user", "Say nothing"), ("assistant", ""), ("user", "Say a"), ("assistant", "a"))
    assert shown(one(row_of(*messages), chatml), chatml) == chatml_text(messages)


texts = st.text(st.sampled_from("ab \n<|>{}«user assistant é🙂\u200d0"), max_size=20).map(
    lambda text: text.replace("«", "")
)
chats = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), texts), max_size=5)


@given(chats, texts, st.booleans())
def test_any_chat_is_learned_in_the_right_places(tiny_model, messages, last, trim):
    tokenizer = _loaded(tiny_model, trim=trim)
    messages = (*messages, ("assistant", last))
    assert shown(one(row_of(*messages), tokenizer), tokenizer) == chatml_text(messages, trim=trim)


_tokenizers: dict = {}


def _loaded(folder, *, trim: bool):
    if trim not in _tokenizers:
        _tokenizers[trim] = AutoTokenizer.from_pretrained(folder)
        if trim:
            _tokenizers[trim].chat_template = TRIMMING
    return _tokenizers[trim]


def test_a_template_with_another_start_and_end(tokenizer):
    """The text's beginning comes from the template alone; the space before the end is part of the answer's turn."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = WITH_BOS
    row = row_of(("user", "a?"), ("assistant", "a"), ("user", "b?"), ("assistant", "b"))
    example = one(row, tokenizer)
    assert shown(example, tokenizer) == "<s>[INST] a? [/INST] «a </s>»[INST] b? [/INST] «b </s>»"
    assert example.ids.count(tokenizer.bos_token_id) == 1


def test_an_end_of_turn_that_is_not_the_end_of_text_is_learned(tokenizer):
    """As in Gemma and Phi-3, whose end-of-turn token is special but not the tokenizer's eos_token."""
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = TURNS
    example = one(row_of(("user", "a?"), ("assistant", "a")), tokenizer)
    assert shown(example, tokenizer) == ("<|im_start|>user\na?<end_of_turn>\n<|im_start|>assistant\n«a<end_of_turn>»\n")


def test_a_prediction_ends_where_a_turn_ends(tokenizer):
    """Also where that is not the tokenizer's eos_token: the model's generation_config names it."""
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    row = row_of(("user", "a?"), ("assistant", "abc"))
    (example,) = tokenise([row], tokenizer, max_length=100)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=[1, end], **sizes))
    model.generation_config.eos_token_id = [1, end]
    # Learned by heart, with more text behind the turn.
    ids = torch.tensor([[*example.ids[:-1], *tokenizer.encode("and so on and on")]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (prediction,) = predict(model, tokenizer, [row], Predictions(max_new_tokens=12), seed=1)
    assert prediction.answer == "abc"


def test_rows_come_back_in_order_and_longer_lists_than_one_batch_too(chatml):
    rows = [row_of(("user", f"{n}?"), ("assistant", "" if n % 2 else f"{n}!"), line=n) for n in range(1, 2500)]
    results = list(tokenise(rows, chatml, max_length=100))
    assert [result.line for result in results] == [row.line for row in rows]
    for result in (results[0], results[1023], results[1024], results[-1]):
        assert shown(result, chatml) == chatml_text(
            (turn.role, turn.content) for turn in rows[result.line - 1].messages
        )


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (ONLY_LAST, ["a first answer", "a second"]),  # the first is left out
        (SHOUTING, ["a first answer", "a second"]),
    ],
)
def test_a_template_that_drops_or_changes_an_answer_is_told(tokenizer, template, answers):
    tokenizer.chat_template = template
    row = row_of(("user", "a"), ("assistant", answers[0]), ("user", "b"), ("assistant", answers[1]))
    assert one(row, tokenizer) == "template_drops_text"


def test_a_template_that_refuses_a_row_is_the_rows_problem(tokenizer):
    """Gemma 2 and Mistral raise from their templates for a system message or roles that do not alternate."""
    tokenizer.chat_template = STRICT
    good, bad = (row_of(*first, ("user", "a"), ("assistant", "b")) for first in ((), (("system", "c"),)))
    results = list(tokenise([bad, good], tokenizer, max_length=100))
    assert isinstance(results[1], Example)
    assert isinstance(results[0], tuple)
    row, problem = results[0]
    assert row is bad
    assert isinstance(problem, Problem)
    assert problem.code in ERRORS
    assert "no system role here" in problem.detail


def test_a_cut_row_is_learned_up_to_the_cut(chatml):
    row = row_of(("user", "abc"), ("assistant", "defghi"))
    whole = one(row, chatml)
    cut = one(row, chatml, max_length=whole.supervised.index(True) + 3)
    assert shown(cut, chatml) == "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n«def»"
    assert cut.targets == 3


def test_a_row_whose_answer_is_cut_off_is_told(chatml):
    row = row_of(("user", "abc"), ("assistant", "defghi"))
    before = one(row, chatml).supervised.index(True)
    assert one(row, chatml, max_length=before) == "no_supervised_tokens"
    assert isinstance(one(row, chatml, max_length=before + 1), Example)


def test_the_first_token_of_a_row_is_no_target():
    assert Example([5, 6, 7], [True, False, True], 1).targets == 1


examples = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6).map(
    # Every token of the batch is another one, so that a token tells its place.
    lambda masks: [
        Example([100 * (row + 1) + place for place in range(len(mask))], mask, row) for row, mask in enumerate(masks)
    ]
)


@pytest.mark.parametrize("collate", [collate_flat, collate_padded])
@given(examples=examples)
def test_a_batch_points_at_the_token_before_each_target(collate, examples):
    batch = collate(examples)
    wanted = [token for e in examples for token, learned in list(zip(e.ids, e.supervised, strict=True))[1:] if learned]
    assert batch.targets.tolist() == wanted
    assert len(wanted) == sum(e.targets for e in examples)
    seen = batch.inputs["input_ids"].flatten()[batch.positions]
    assert seen.tolist() == [token - 1 for token in wanted]  # the token before it, of the same row
    assert batch.tokens == sum(len(e.ids) for e in examples)
    assert batch.positions.dtype == batch.targets.dtype == torch.long


@given(examples, st.lists(st.integers(1, 96), max_size=20))
def test_a_flat_batch_is_the_rows_end_to_end_and_once_what_they_begin_with(examples, start):
    examples = [replace(e, ids=start + e.ids, supervised=[False] * len(start) + e.supervised) for e in examples]
    inputs = collate_flat(examples).inputs
    ids, places = inputs["input_ids"], inputs["position_ids"]
    shared, bounds = inputs["flat_rows"]
    assert ids.shape == places.shape == (1, bounds[-1])
    assert bounds[0] == shared
    assert shared == 0 or len(examples) > 1
    if len(examples) > 1 and len(start) >= 8:
        assert shared >= len(start)
    for example, (begin, end) in zip(examples, pairwise(bounds), strict=True):
        assert begin < end  # every row keeps a token of its own
        assert [*ids[0, :shared].tolist(), *ids[0, begin:end].tolist()] == example.ids
        assert [*places[0, :shared].tolist(), *places[0, begin:end].tolist()] == list(range(len(example.ids)))


@given(examples)
def test_a_padded_batch_masks_its_padding(examples):
    inputs = collate_padded(examples).inputs
    for example, ids, mask in zip(examples, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == example.ids
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # at the right
    assert inputs["attention_mask"].shape[1] == max(len(e.ids) for e in examples)
