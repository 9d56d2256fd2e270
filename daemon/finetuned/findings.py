"""Every code that a data report may hold, with what it means and what to do about it. docs/data.md shows this table."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args


class Finding(NamedTuple):
    """What a code stands for."""

    meaning: str
    remedy: str


# A row with one of these is bad: it is left out, or the file is refused if too many are.
ERRORS: dict[str, Finding] = {
    "not_json": Finding("a line is no JSON", "Each line must be one whole JSON object."),
    "not_utf8": Finding("a line is no UTF-8", "Save the file as UTF-8."),
    "row_too_large": Finding("a row is longer than 64 MiB", "Split the row."),
    "truncated_last_line": Finding(
        "the file ends in the middle of a row", "The upload or export was cut off; make the file again."
    ),
    "mixed_formats": Finding(
        "a row is of another format than those before it", "Put rows of each format into a file of their own."
    ),
    "preference_data": Finding(
        "rows compare or label answers",
        "Chats are trained here, comparisons are not; keep the wanted answer as a chat.",
    ),
    "data_type": Finding("a row, message or content is of the wrong type", "Rows and messages are JSON objects."),
    "missing_messages_list": Finding(
        "no format that is known has a row's keys",
        'Write each row as {"messages": [{"role": "user", "content": "..."}, ...]}, or in a format of docs/data.md.',
    ),
    "message_missing_key": Finding(
        "a message has no role or no content, or a row lacks a key of its format", "Give each its keys."
    ),
    "message_unrecognized_key": Finding(
        "a message has a key that no chat format knows", "Take it out, or move it beside the messages."
    ),
    "unrecognized_role": Finding(
        "a role is unknown",
        "Roles are system, developer, user, assistant, tool and function; in ShareGPT system, human, gpt, observation "
        "and function_call.",
    ),
    "missing_content": Finding("a content is null or a text is empty", "Give it a text; null cannot be learned."),
    "example_missing_assistant_message": Finding(
        "a row has no assistant turn", "Without an assistant turn there is nothing to learn from the row."
    ),
    "template_refuses_row": Finding(
        "the model's chat template refuses a row",
        "The model's chat template takes no such row; mend it, or take another model.",
    ),
    "template_drops_text": Finding(
        "a text of the row is not in what the template made of it",
        "The model's chat template changes or leaves out a text; another model may keep it.",
    ),
    "no_end_of_turn": Finding(
        "no end-of-turn token stands behind an answer",
        "A model trained so would never stop; take one whose chat template ends its turns.",
    ),
    "no_supervised_tokens": Finding(
        "no token of an answer lies within max_length",
        "Raise max_length, shorten the question, or give an answer a weight of 1.",
    ),
    "answer_not_checkable": Finding(
        "a row's answer cannot be held against another, which the recipe lives on",
        "End each row with the right answer in a form that the judge reads: docs/evaluation.md.",
    ),
}

# With one of these the file is refused, however many rows max_bad_rows would leave out.
FATAL = frozenset({"truncated_last_line", "mixed_formats", "preference_data"})

Warned = Literal[
    "exact_duplicates",
    "near_duplicates",
    "bare_number_answers",
    "single_token_answers",
    "empty_answers",
    "answer_equals_prompt",
    "dominant_answer",
    "rows_cut",
    "beyond_reach",
    "roles_out_of_order",
    "mixed_system_languages",
    "system_prompt_added",
    "leaked_special_tokens",
    "eval_overlap",
]

# Rows with these are trained; `fail_on` may name codes that stop a job.
WARNINGS: dict[Warned, Finding] = {
    "exact_duplicates": Finding(
        "rows that occur before in the same words", "Take the copies out; they are learned more often than the rest."
    ),
    "near_duplicates": Finding(
        "rows that share most of their token sequences with an earlier one", "Look whether they add anything."
    ),
    "bare_number_answers": Finding(
        "an answer is nothing but a number",
        "If that is not what the model is to say, look at the program that wrote the file.",
    ),
    "single_token_answers": Finding(
        "an answer is a single token", "There is little to learn from it; let the answer say why."
    ),
    "empty_answers": Finding("an answer is empty or blank", "Take the row out, or give it an answer."),
    "answer_equals_prompt": Finding("an answer repeats its question", "Look whether two columns were swapped."),
    "dominant_answer": Finding(
        "one answer is that of many rows", "The model may give it always; balance the file, and hold rows back to see."
    ),
    "rows_cut": Finding("rows are longer than max_length", "Raise max_length, or split the rows; the end is not seen."),
    "beyond_reach": Finding(
        "rows are longer than the model, or its teacher, was made to read",
        "Lower max_length, or take a model for longer rows; what lies beyond makes little sense to it.",
    ),
    "roles_out_of_order": Finding(
        "turns do not alternate, or the last one is not the assistant's", "Mend the order of the messages."
    ),
    "mixed_system_languages": Finding(
        "system prompts are written in several languages", "Take one language, the one the model will be asked in."
    ),
    "system_prompt_added": Finding(
        "rows without a system message got the configured one",
        "Use the same one when you ask the model; set system_prompt to null for none.",
    ),
    "leaked_special_tokens": Finding(
        "a content holds a chat template's own marks", "Take them out: they end turns where none ends."
    ),
    "eval_overlap": Finding(
        "held-out questions that the training file asks too", "Take them out of one; the held-out loss flatters."
    ),
}

assert set(get_args(Warned)) == WARNINGS.keys()
