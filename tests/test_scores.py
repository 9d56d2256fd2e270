"""What a measurement says in words: the same in terminal, model card, log and browser."""

from __future__ import annotations

from typing import Any

from finetuned.scores import headline, sentences, table


def share(count: int, of: int) -> dict[str, Any]:
    return {"count": count, "of": of, "value": count / of, "low": 0.1, "high": 0.9}


def model(name: str, right: int, **more: Any) -> dict[str, Any]:
    loss = {"value": 1.5, "low": 1.25, "high": 1.75}
    figures = {"loss": loss, "perplexity": {"value": 4.48, "low": None, "high": None}, "accuracy": share(right, 4)}
    figures |= {"answer_rate": share(4, 4), "accuracy_unseen": share(1, 3), "cut_off": 0, "errors": 0}
    return {"name": name, "first_error": None, "seconds": 1.0, **figures, **more}


def measurement(**more: Any) -> dict[str, Any]:
    facts = {
        "data": {"file": "held.jsonl", "sha256": "0", "rows": 4, "questions": 4},
        "judge": {"kind": "number", "reason": "as set"},
        "max_new_tokens": 64,
        "models": [model("base", 0), model("x", 3)],
        "compared": [{"name": "x", "other": "base", "wins": 3, "losses": 0, "ties": 1, "p": 0.25}],
        "overlap": {"files": ["x.jsonl"], "missing": [], "rows": []},
    }
    return {**facts, **more}


def test_a_line_a_model_each_figure_with_its_interval():
    assert table(measurement()) == [
        ["", "loss", "perplexity", "accuracy", "answer rate"],
        [
            "base",
            "1.5000 (1.2500 to 1.7500)",
            "4.48",
            "0 of 4, 0.0% (10.0% to 90.0%)",
            "4 of 4, 100.0% (10.0% to 90.0%)",
        ],
        ["x", "1.5000 (1.2500 to 1.7500)", "4.48", "3 of 4, 75.0% (10.0% to 90.0%)", "4 of 4, 100.0% (10.0% to 90.0%)"],
    ]
    assert headline(measurement()) == "held.jsonl: accuracy 75.0% (base 0.0%), loss 1.5000 (base 1.5000)"


def test_it_says_who_won_and_that_nothing_was_seen_in_training():
    assert sentences(measurement()) == [
        "x against base: 3 wins, 0 losses, 1 ties, p = 0.25 (two-sided sign test)",
        "no row stands in the training data (x.jsonl)",
    ]


def test_a_leak_is_the_first_thing_said_of_the_data_and_has_a_column():
    row = {"line": 2, "file": "x.jsonl", "of_line": 7, "share": 1.0}
    facts = measurement(overlap={"files": ["x.jsonl"], "missing": ["old"], "rows": [row]})
    assert [line[-1] for line in table(facts)] == ["accuracy without the 1 seen"] + [
        "1 of 3, 33.3% (10.0% to 90.0%)"
    ] * 2
    assert sentences(facts)[1:] == [
        "CONTAMINATED: 1 of 4 rows stand in the training data: line 2 (x.jsonl:7)",
        "not looked for in the training data of old, which is not there (--trained-on FILE names it)",
    ]


def test_what_has_no_figure_is_a_dash_and_what_went_wrong_is_told():
    troubled = model("x", 0, accuracy=None, answer_rate=None, cut_off=3, errors=1, first_error="out of memory")
    facts = measurement(models=[troubled], compared=[], overlap={"files": [], "missing": [], "rows": []})
    assert table(facts)[1][3:] == ["-", "-"]
    assert headline(facts) == "held.jsonl: loss 1.5000"
    assert sentences(facts) == [
        "cut off at 64 tokens: 3 of x's answers",
        "not answered by x: 1 of the questions (out of memory)",
    ]
