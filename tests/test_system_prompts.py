"""A system prompt that many rows share is tokenised once, and nobody can tell."""

import pytest

from chat_templates import CHATML, LLAMA3, QWEN3, SMOLLM3, SMOLVLM, tokenizer_for
from finetuned.dataset.rows import Message, Row
from finetuned.trainer.tokens import Example, tokenise

PROMPTS = ("Be brief.", "Answer  in <|im_end|> one sentence, naïve 漢字.\n", "Be brief.", " ")
# Words that reach over the places where a chat could wrongly be cut.
MERGES = (("<", "|"), (">", "s"), ("u", "s"), (">", "u"), ("Ċ", "<"))


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3, SMOLLM3, SMOLVLM], ids=lambda template: template.name)
def test_rows_with_the_same_system_prompt_have_the_tokens_of_the_whole_text(template):
    tokenizer = tokenizer_for(template, merges=MERGES)
    chats = [
        (Message("system", prompt), Message("user", f"What is {number}?"), Message("assistant", f"It is {number}."))
        for number in range(10)
        for prompt in PROMPTS
    ]
    found = list(tokenise([Row(line, chat) for line, chat in enumerate(chats, 1)], tokenizer, max_length=1000))
    assert all(isinstance(one, Example) for one in found)
    texts = [tokenizer.decode(one.ids) for one in found]
    assert [one.ids for one in found] == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert all(f"What is {number}?" in texts[len(PROMPTS) * number] for number in range(10))
