"""`finetuned check` as its users meet it: a real process on real files, every format and every code."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard

from conftest import CHATML, chat_rows, make_home, write_config, write_jsonl
from finetuned.findings import ERRORS, WARNINGS
from finetuned.home import Home
from finetuned.trainer import history

MAX_LENGTH = 512  # tokens, which are bytes in the tiny model


class Said(NamedTuple):
    """What a process said."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict:
        return json.loads(self.out)


def check(*words: object, cwd: Path | None = None, **environment: str) -> Said:
    clean = {key: value for key, value in os.environ.items() if key != "FINETUNED_HOME"}
    done = subprocess.run(
        [sys.executable, "-m", "finetuned", "check", *map(str, words)],
        cwd=cwd,
        env={**clean, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def chat(question: str, answer: str, **more: object) -> dict:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **more,
    }


def settled(home: Home, model: Path, **settings: object) -> Home:
    write_config(home, model=str(model), max_length=MAX_LENGTH, **settings)
    return home


@pytest.fixture
def base(home, tiny_model) -> Home:
    """A base directory for the tiny model."""
    return settled(home, tiny_model)


# -- formats and files

QUESTION, ANSWER = "How far is it?", "Nine miles."
FORMATS = {
    "OpenAI chat": chat(QUESTION, ANSWER),
    "ShareGPT": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "Alpaca": {"instruction": "How far", "input": "is it?", "output": ANSWER},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "question and answer": {"question": QUESTION, "answer": ANSWER},
    "plain text": {"text": f"{QUESTION} {ANSWER}"},
}


def lines(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


FILES = {
    "x.jsonl": lines,
    "x.json": lambda row: json.dumps([row, row], indent=1).encode(),
    "X.JSON": lines,  # a row a line, by a wrong name
    "x.jsonl.gz": lambda row: gzip.compress(lines(row)),
    "a b.jsonl.zst": lambda row: zstandard.compress(lines(row)),
    "x.txt": lambda row: b"\xef\xbb\xbf" + lines(row).replace(b"\n", b"\r\n\r\n"),
}


@pytest.mark.parametrize(("format_", "name"), list(zip(FORMATS, FILES, strict=True)))
def test_every_format_is_told_and_shown_as_the_model_sees_it(base, tmp_path, format_, name):
    (tmp_path / name).write_bytes(FILES[name](FORMATS[format_]))
    said = check(name, "--base-dir", base.root, "--json", cwd=tmp_path)
    assert (said.code, said.facts["verdict"], said.facts["format"]) == (0, "usable", format_)
    assert not said.facts["errors"]
    learned = "".join(text for text, learned in said.facts["sample"]["pieces"] if learned)
    asked = "".join(text for text, learned in said.facts["sample"]["pieces"] if not learned)
    if format_ == "plain text":
        assert (learned, asked) == (f"{QUESTION} {ANSWER}<|im_end|>", "")
    else:
        assert learned == f"{ANSWER}<|im_end|>"
        assert ("How far\nis it?" if format_ == "Alpaca" else QUESTION) in asked
    assert said.facts["training"]["supervised"] >= len(ANSWER)


def test_a_link_is_read_as_what_it_is_called(base, tmp_path):
    (tmp_path / "1f3a").write_bytes(FILES["x.json"](FORMATS["Alpaca"]))
    (tmp_path / "x.json").symlink_to("1f3a")
    said = check(tmp_path / "x.json", "--base-dir", base.root, "--json")
    assert (said.facts["file"], said.facts["rows"]) == ("x.json", 2)


# -- every error

# Refuses one row, leaves a text out of another, and ends a third without its mark.
PICKY = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if message['content'] == 'Refuse me.' %}{{ raise_exception('no') }}{% endif %}",
)
PICKY = PICKY.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if message['content'] != 'Drop me.' %}{{ message['content'] }}{% endif %}"
    "{% if message['content'] != 'Go on.' %}<|im_end|>{% endif %}",
)

PROVOKED = {  # each in a row of its own; a good one stands before them
    "not_json": b'{"messages": oops}\n',
    "not_utf8": lines(chat("a", "zz")).replace(b"zz", b"\xff\xfe"),
    "mixed_formats": lines({"prompt": "a", "completion": "b"}),
    "preference_data": lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
    "data_type": lines([1, 2]),
    "missing_messages_list": lines({"words": "a"}),
    "message_missing_key": lines({"messages": [{"content": "a"}]}),
    "message_unrecognized_key": lines(
        {"messages": [{"role": "user", "content": "a", "mood": "b"}, {"role": "assistant", "content": "c"}]}
    ),
    "unrecognized_role": lines({"messages": [{"role": "king", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    "missing_content": lines(chat("a", None)),
    "example_missing_assistant_message": lines({"messages": [{"role": "user", "content": "a"}]}),
    "template_refuses_row": lines(chat("Refuse me.", "a")),
    "template_drops_text": lines(chat("Drop me.", "a")),
    "no_end_of_turn": lines(chat("b", "Go on.")),
    "no_supervised_tokens": lines(chat("long " * MAX_LENGTH, "a")),
    "answer_not_checkable": lines(chat("Which one?", "7")),
    "row_too_large": b"\0" * (64 * 2**20 + 1) + b"\n",
    "truncated_last_line": b'{"messages": [{"role": "us',
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory, tiny_model) -> tuple[Said, Said]:
    """What is said about a file with every error: as text, and as JSON."""
    folder = tmp_path_factory.mktemp("spoiled")
    shutil.copytree(tiny_model, folder / "picky")
    (folder / "picky" / "chat_template.jinja").write_text(PICKY)
    choices = {"kind": "choice", "choices": ["Good day.", "Go on.", "a"]}
    home = settled(make_home(folder / "base"), folder / "picky", max_bad_rows=1, recipe="rft", judge=choices)
    with (folder / "x.jsonl").open("wb") as file:
        for line in (lines(chat("Hello.", "Good day.")), *PROVOKED.values()):
            file.write(line)
    words = (folder / "x.jsonl", "--base-dir", home.root)
    return check(*words), check(*words, "--json")


def test_every_error_is_provoked():
    assert PROVOKED.keys() == ERRORS.keys()


@pytest.mark.parametrize(("code", "line"), list(zip(PROVOKED, range(2, 99), strict=False)))
def test_every_error_is_told_with_its_line_and_its_remedy(spoiled, code, line):
    text, facts = spoiled[0].out, spoiled[1].facts
    found = facts["errors"][code]
    assert (found["count"], found["lines"], found["remedy"]) == (1, [line], ERRORS[code].remedy)
    assert re.search(
        rf"^  {code}: 1 row, at line {line}\b.*\n    {re.escape(ERRORS[code].remedy)}$", text, re.MULTILINE
    )


def test_a_spoiled_file_is_refused_and_its_good_rows_counted(spoiled):
    text, machine = spoiled
    assert (text.code, machine.code) == (1, 1)
    assert machine.facts["verdict"] == "refused"
    assert machine.facts["bad_rows"] == machine.facts["rows"] - 1 == len(ERRORS)
    assert machine.facts["training"]["rows"] == 1
    assert "refused: x.jsonl:" in text.out


# -- every warning

ENGLISH = "You answer questions about the weather, shortly and without any jokes."
GERMAN = "Du beantwortest Fragen zum Wetter, und zwar kurz und ohne irgendwelche Scherze."
TALE = "Once upon a time a miller lived at the river with his daughter, who could spin straw into gold, he said. "


def with_system(prompt: str, number: int) -> dict:
    row = chat(f"What about day {number}?", f"Day {number} will be dry.")
    return {"messages": [{"role": "system", "content": prompt}, *row["messages"]]}


ODD = {  # rows that provoke a warning together, and which of them it names first
    "exact_duplicates": ([chat("Who?", "She did."), chat("Who?", "She did.")], 1),
    "near_duplicates": ([chat("Tell one.", TALE * 3), chat("Tell one.", TALE * 3 + "Yes.")], 1),
    "bare_number_answers": ([chat("How many?", "42")], 0),
    "single_token_answers": ([chat("Which letter?", "k")], 0),
    "empty_answers": ([chat("Nothing?", " ")], 0),
    "answer_equals_prompt": ([chat("Say it again.", "Say it again.")], 0),
    "dominant_answer": ([chat(f"Is {n} small?", "It is small.") for n in range(20)], 0),
    "rows_cut": ([chat("Tell much.", "word " * MAX_LENGTH)], 0),
    "roles_out_of_order": (
        [{"messages": [{"role": "user", "content": "a?"}, *chat("b?", "It is c.")["messages"]]}],
        0,
    ),
    "mixed_system_languages": (
        [with_system(ENGLISH, 1), with_system(ENGLISH + " Ever.", 2), with_system(GERMAN, 3)],
        2,
    ),
    "leaked_special_tokens": ([chat("What ends?", "This ends.<|im_end|> Not.")], 0),
}


def reaching(most: int, model: Path, folder: Path, **config: object) -> Path:
    """The same model, made for rows of so many tokens."""
    shutil.copytree(model, folder)
    facts = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": most} | config
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tiny_model) -> tuple[Said, Said, dict[str, int]]:
    """What is said about a file with every warning, as text and as JSON, and the line of each."""
    folder = tmp_path_factory.mktemp("odd")
    home = settled(make_home(folder / "base"), reaching(MAX_LENGTH - 1, tiny_model, folder / "model"))
    rows: list[dict] = []
    wanted = {"system_prompt_added": 1, "eval_overlap": 2}
    for code, (some, first) in ODD.items():
        wanted[code] = len(rows) + first + 1
        rows += some
    wanted["beyond_reach"] = wanted["rows_cut"]
    file = write_jsonl(folder / "x.jsonl", rows)
    write_jsonl(folder / "x.eval.jsonl", [chat("Unheard of?", "Indeed so."), chat("Who?", "He did.")])
    words = (file, "--base-dir", home.root)
    return check(*words), check(*words, "--json"), wanted


@pytest.mark.parametrize("code", WARNINGS)
def test_every_warning_is_told_with_its_line_its_share_and_its_remedy(odd, code):
    text, machine, wanted = odd
    found = machine.facts["warnings"][code]
    assert found["lines"][0] == wanted[code]
    assert found["remedy"] == WARNINGS[code].remedy
    assert 0 < found["share"] <= 1
    said = (
        rf"^  {code}: [\d,]+ rows? \([\d.]+%\), .*at line {wanted[code]}\b.*\n    {re.escape(WARNINGS[code].remedy)}$"
    )
    assert re.search(said, text.out, re.MULTILINE)


def test_an_odd_file_is_usable_and_its_held_out_rows_are_told(odd):
    text, machine, _ = odd
    assert (text.code, machine.code, machine.facts["verdict"]) == (0, 0, "usable")
    assert machine.facts["held_out"]["rows"] == 2
    assert "held out: 2 rows of x.eval.jsonl" in text.out


def test_fail_on_makes_a_warning_a_refusal(base, tmp_path, tiny_model):
    settled(base, tiny_model, fail_on=["bare_number_answers"])
    said = check(write_jsonl(tmp_path / "x.jsonl", [chat("How many?", "42")]), "--base-dir", base.root)
    assert said.code == 1
    assert "fail_on" in said.out.splitlines()[-1]


def test_max_bad_rows_decides_whether_a_file_is_refused(base, tmp_path, tiny_model):
    file = write_jsonl(tmp_path / "x.jsonl", [*chat_rows(9), {"messages": []}])
    refused = check(file, "--base-dir", base.root)
    assert refused.code == 1
    assert "max_bad_rows" in refused.out
    settled(base, tiny_model, max_bad_rows=0.1)
    assert check(file, "--base-dir", base.root).code == 0


# -- what would be trained


def test_the_report_says_what_would_be_trained(base, tmp_path, tiny_model):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(40))
    first = check(file, "--base-dir", base.root)
    assert "10 steps of 4 rows, 1 epoch\n" in first.out  # as write_config has it
    assert "`finetuned plan`" in first.out
    assert "«The number is 0.<|im_end|>»" in first.out
    assert "####" in first.out
    kind = {"model": str(tiny_model), "method": "lora", "device": "cpu"}
    history.remember(
        history.file_beside(base.models), history.Record(**kind, predicted=1, peak=300 * 2**20, tokens_per_second=100.0)
    )
    facts = check(file, "--base-dir", base.root, "--json", CUDA_VISIBLE_DEVICES="").facts
    estimate = facts["estimate"]
    assert (estimate["peak_bytes"], estimate["jobs"]) == (300 * 2**20, 1)
    assert estimate["minutes"] == pytest.approx(facts["training"]["tokens"] / 100 / 60, abs=0.01)


def test_of_rft_it_tells_the_judge_and_the_answers_to_be_made_and_no_steps(home, tmp_path, tiny_model):
    settled(home, tiny_model, recipe="rft", rft={"samples": 3, "rounds": 2}, teacher="another")
    file = write_jsonl(tmp_path / "x.jsonl", [chat(f"What is {n} + 1?", str(n + 1)) for n in range(12)])
    found = check(file, "--base-dir", home.root)
    assert found.code == 0
    assert "recipe: rft, answers judged by number (every expected answer is a number); teacher in the" in found.out
    assert re.search(r"questions +12\n +answers +72\n", found.out)
    assert " steps of " not in found.out
    assert "held against is marked" in found.out
    assert "bare_number_answers" not in found.out  # they are not learned


def test_settings_of_another_recipe_are_told_to_count_for_nothing(home, tmp_path, tiny_model):
    settled(home, tiny_model, rft={"samples": 3}, teacher="another")
    found = check(write_jsonl(tmp_path / "x.jsonl", chat_rows(4)), "--base-dir", home.root)
    assert "recipe: sft; teacher and rft in the settings count for nothing\n" in found.out


@pytest.mark.parametrize("lengths", [range(30, 44), [2, 500], [50] * 3, range(20, 120, 3)], ids=str)
def test_each_bar_of_the_histogram_is_called_by_the_most_tokens_in_it(base, tmp_path, lengths):
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "x" * (length - 1)} for length in lengths])
    bars = check(file, "--base-dir", base.root, "--json").facts["tokens"]["histogram"]
    assert bars[-1][0] == max(lengths)
    for place, (most, _) in enumerate(bars, start=1):
        assert sum(count for _, count in bars[:place]) == sum(length <= most for length in lengths)


def test_eval_fraction_holds_rows_back(base, tmp_path, tiny_model):
    settled(base, tiny_model, eval_fraction=0.3)
    facts = check(write_jsonl(tmp_path / "x.jsonl", chat_rows(60)), "--base-dir", base.root, "--json").facts
    assert 0 < facts["held_out"]["rows"] < 60
    assert facts["held_out"]["rows"] + facts["training"]["rows"] == 60


def test_the_second_look_takes_the_tokens_of_the_first(base, tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(5))
    first = check(file, "--base-dir", base.root, "--json").facts
    (kept,) = (base.models.parent / "tokens").iterdir()
    report = json.loads((kept / "report.json").read_text())
    (kept / "report.json").write_text(json.dumps({**report, "format": "kept"}))
    assert check(file, "--base-dir", base.root, "--json").facts == {**first, "format": "kept"}


def test_on_a_terminal_what_is_learned_is_in_colour_and_progress_is_shown(base, tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(5))
    screen, end = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-m", "finetuned", "check", str(file), "--base-dir", str(base.root)],
        stdout=end,
        stderr=end,
        env={**environment, "TERM": "xterm"},
    ):
        os.close(end)
        said = b""
        try:
            while part := os.read(screen, 2**16):
                said += part
        except OSError:  # the other end is closed
            pass
    os.close(screen)
    assert b"\x1b[32m\x1b[1mThe number is 0.<|im_end|>\x1b[0m" in said
    assert "«".encode() not in said
    assert b"reading x.jsonl" in said


def test_letters_that_a_terminal_lacks_are_written_as_numbers(base, tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", [chat("What for?", "For 5 \N{EURO SIGN}.")])
    assert "For 5 \\u20ac." in check(file, "--base-dir", base.root, PYTHONIOENCODING="latin-1").out


# -- what cannot be had


@pytest.mark.parametrize("model", ["./nowhere", "nobody/has-this"])
def test_without_the_model_all_else_is_checked(base, tmp_path, model):
    file = write_jsonl(tmp_path / "x.jsonl", [*chat_rows(9), chat("How many?", "42"), chat("How many?", "42")])
    words = (file, "--base-dir", base.root, "--model", model)
    text, facts = check(*words), check(*words, "--json").facts
    assert text.code == 0
    assert "Templates, tokens and lengths were not checked." in text.out
    assert "usable, as far as was checked" in text.out
    assert "Templates" in facts["unchecked"]
    assert {"exact_duplicates", "bare_number_answers"} <= facts["warnings"].keys()
    assert (facts["tokens"], facts["training"]["steps"]) == ({}, 3)

    refused = check(write_jsonl(tmp_path / "bad.jsonl", [{}]), *words[1:])
    assert refused.code == 1
    assert "missing_messages_list: 1 row, at line 1" in refused.out


UNREADABLE = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n \n", "the file holds no rows"),
    "cut.jsonl.gz": (gzip.compress(lines(chat("a", "b")))[:-9], "damaged or cut off"),
    "utf16.jsonl": (json.dumps(chat("a", "b")).encode("utf-16"), "UTF-16"),
    "pretty.jsonl": (json.dumps([chat("a", "b")], indent=1).encode(), "array"),
}


@pytest.mark.parametrize("name", UNREADABLE, ids=ascii)
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(base, tmp_path, name):
    content, why = UNREADABLE[name]
    file = tmp_path / name
    file.write_bytes(content)
    text = check(file, "--base-dir", base.root)
    assert (text.code, text.out) == (1, "")
    assert why in text.err


@pytest.mark.parametrize("content", [lines(chat("What?", "That.\x1b[2J")), b"{}\n", b""])
def test_no_name_or_content_of_a_file_plays_with_the_terminal(base, tmp_path, content):
    file = tmp_path / "odd\udcff\x1b[2J\nname.jsonl"
    file.write_bytes(content)
    text = check(file, "--base-dir", base.root)
    assert "odd\\xff\\x1b[2J" in text.out + text.err or "odd\\udcff\\x1b[2J" in text.out + text.err
    assert "\x1b" not in text.out + text.err
    assert check(file, "--base-dir", base.root, "--json").facts["verdict"] == (
        "usable" if len(content) > 9 else "refused"
    )


def test_a_file_that_cannot_be_read_is_one_object_for_machines(base, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    said = check(tmp_path / "empty.jsonl", "--base-dir", base.root, "--json")
    assert said.code == 1
    assert (said.facts["verdict"], said.facts["reason"]["code"]) == ("refused", "empty_file")


def test_what_is_no_file_is_named(base, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    pipe = check(tmp_path / "pipe.jsonl", "--base-dir", base.root)
    assert pipe.code == 1
    assert "no regular file" in pipe.err
    folder, missing = check(tmp_path, "--base-dir", base.root), check(tmp_path / "none.jsonl")
    assert (folder.code, missing.code) == (2, 2)
    assert "is a directory" in folder.err
    assert "does not exist" in missing.err


def test_bad_settings_are_named_and_are_not_the_file_s_fault(base, tmp_path, tiny_model):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(3))
    assert check(file, "--base-dir", base.root, "--profile", "none").code == 78
    settled(base, tiny_model, eval_file="missing.jsonl")
    said = check(file, "--base-dir", base.root)
    assert said.code == 78
    assert "eval_file" in said.err
    settled(base, tiny_model, fail_on=["no_such_code"])
    assert "fail_on" in check(file, "--base-dir", base.root).err


def test_two_held_out_files_are_one_too_many(base, tmp_path):
    for name in ("x.jsonl", "x.eval.jsonl", "x.eval.json"):
        write_jsonl(tmp_path / name, chat_rows(3))
    said = check(tmp_path / "x.jsonl", "--base-dir", base.root)
    assert said.code == 1
    assert "several held-out files: x.eval.json, x.eval.jsonl" in said.err


# ---------------------------------------------------------------- what a new user stumbled over


def test_it_says_where_its_settings_are_from(tmp_path, tiny_model):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(1))
    text = check(file, "--model", tiny_model, cwd=tmp_path).out
    assert "settings: finetuned's defaults, as this folder is no base directory" in text
    assert text.startswith("x.jsonl: 1 row of ")
    home = make_home(tmp_path / "base")
    write_config(home, model=str(tiny_model), profiles={"careful": {"epochs": 1}})
    text = check(file, "--base-dir", home.root, "--profile", "careful").out
    assert f"settings: {home.config_file}, then profile careful\n" in text


def test_a_held_out_file_may_be_named(tmp_path, tiny_model):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(3))
    write_jsonl(tmp_path / "x.eval.jsonl", chat_rows(1, start=50))
    other = write_jsonl(tmp_path / "other.jsonl", chat_rows(2, start=20))
    assert "held out: 1 row of x.eval.jsonl" in check(file, "--model", tiny_model).out
    assert "held out: 2 rows of other.jsonl" in check(file, "--model", tiny_model, "--eval-file", other).out


@pytest.mark.parametrize("ending", [".csv", ".TSV"])
def test_a_table_is_told_how_to_become_rows(tmp_path, tiny_model, ending):
    comma = "," if ending == ".csv" else "\t"
    table = tmp_path / f"it's a {ending}"
    table.write_text(f"prompt{comma}completion\nWho?{comma}me\n")
    said = check(table.name, cwd=tmp_path)
    assert said.code == 1
    assert "is a table" in said.err
    program = said.err[said.err.index("python3 -c") :].strip()
    subprocess.run(program, shell=True, cwd=tmp_path, check=True)
    rows = (tmp_path / f"{table.stem}.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{"prompt": "Who?", "completion": "me"}]
    assert check(tmp_path / f"{table.stem}.jsonl", "--model", tiny_model).code == 0


def test_rows_longer_than_a_model_has_places_for_are_refused(base, tmp_path):
    """GPT-2 has learned each place by itself, and there is none behind the last."""
    short, long = chat("Who?", "She."), chat("Who?", "word " * 20)
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 100, "rope_parameters": None}
    model = reaching(100, Path(json.loads(base.config_file.read_text())["model"]), tmp_path / "gpt2", **gpt2)
    for rows, code in (([short], 0), ([short, long], 1)):
        said = check(write_jsonl(tmp_path / f"{len(rows)}.jsonl", rows), "--base-dir", base.root, "--model", model)
        assert said.code == code, said
    assert "1 row cannot be read: the longest has" in said.err
    assert "Set max_length to 100 or less" in said.err


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 60}


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({"architectures": ["JambaForCausalLM"], "model_type": "jamba", "rope_parameters": None}, True),
        ({"rope_parameters": YARN}, False),  # for 60 before it was stretched
    ],
)
def test_rows_longer_than_a_model_without_a_table_of_places_was_made_for_are_taken(base, tmp_path, config, warned):
    model = reaching(60, Path(json.loads(base.config_file.read_text())["model"]), tmp_path / "model", **config)
    file = write_jsonl(tmp_path / "x.jsonl", [chat("Who?", "word " * 20)])
    said = check(file, "--base-dir", base.root, "--model", model, "--json")
    assert said.code == 0, said
    assert ("beyond_reach" in said.facts["warnings"]) is warned
