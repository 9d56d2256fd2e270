"""config.json: what it may hold, who overrides whom, and how everything wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuned.config import Config, json_schema, load_config, read_overrides, resolve, settings_from, starter
from finetuned.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]


def written(folder: Path, content: object, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(folder: Path, content: object) -> str:
    """What load_config says against it."""
    path = written(folder, content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.where == str(path)
    return str(caught.value)


# -- reading config.json


def test_an_empty_object_gives_the_defaults(tmp_path):
    assert load_config(written(tmp_path, {})) == Config()


def test_all_errors_are_said_at_once_each_with_its_path(tmp_path):
    said = refused(
        tmp_path,
        {
            "batch_size": 0,
            "epochs": "many",
            "modle": "x",
            "predictions": {"samples": -1, "sample": 3},
            "profiles": {"fast": {"epochs": 0, "speed": 3}, "slow": {"predictions": {"max_new_tokens": 0}}},
        },
    )
    lines = [line.strip().split(":")[0] for line in said.splitlines()[1:]]
    assert sorted(lines) == [
        "batch_size",
        "epochs",
        "modle",
        "predictions.sample",
        "predictions.samples",
        "profiles.fast.epochs",
        "profiles.fast.speed",
        "profiles.slow.predictions.max_new_tokens",
    ]


def test_a_contradiction_does_not_hide_the_other_errors(tmp_path):
    said = refused(tmp_path, {"use_qlora": True, "tuning": "full", "batch_size": 0, "modle": "x"})
    assert "contradicts" in said
    assert "batch_size" in said
    assert "modle" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epochs": "many"}, 'epochs: must be a number, not "many"'),
        ({"lora_r": 1.5}, "lora_r: must be a whole number, not 1.5"),
        ({"model": None}, "model: must be a text, not null"),
        ({"model": ""}, 'model: must be a text that is not empty, not ""'),
        ({"fallback_4bit": "maybe"}, 'fallback_4bit: must be true or false, not "maybe"'),
        ({"rft": 3}, 'rft: must be a table, {"key": value}, not 3'),
        ({"fail_on": 3}, "fail_on: must be a list, not 3"),
        ({"tuning": "QLORA"}, 'tuning: must be "qlora", "lora-8bit", "lora", "full" or "auto", not "QLORA"'),
        ({"teacher_device": "tpu"}, 'teacher_device: must be "auto", "cpu" or "cuda", not "tpu"'),
        ({"gpus": []}, "gpus: must be a list that is not empty, not []; leave it out for all"),
        ({"batch_size": 0}, 'batch_size: must be at least 1 or "auto", not 0'),
        ({"max_bad_rows": 1.1}, "max_bad_rows: must be at most 1, not 1.1"),
        ({"lora_alpha": 0}, "lora_alpha: must be more than 0, not 0"),
        ({"lora_dropout": 1}, "lora_dropout: must be less than 1, not 1"),
        ({"learning_rate": 1000}, 'at most 10 or "auto", not 1000; usual are 2e-4 for adapters'),
        ({"distill": {"temperature": [1]}}, "must be a number or a list of at least 2 entries, not [1]"),
        ({"rft": {"examples": [{"question": "Who?"}]}}, "rft.examples.0.answer: is missing"),
        ({"judge": {"pattern": "("}}, "judge.pattern: is no regular expression"),
        ({"predictions": {"sample": 3}}, "predictions.sample: no such setting; did you mean predictions.samples?"),
        ({"profiles": {"a": {"hybrid": {"ambiguty": 1}}}}, "profiles.a.hybrid.ambiguty: no such setting; did you"),
    ],
)
def test_what_is_wrong_is_said_in_words_for_those_who_write_settings(tmp_path, content, said):
    assert said in refused(tmp_path, content)


def test_an_unknown_key_is_named_and_refused(tmp_path):
    assert "modle: no such setting" in refused(tmp_path, {"modle": "gpt2"})


def test_a_profile_holds_training_settings_only(tmp_path):
    said = refused(tmp_path, {"profiles": {"a": {"quiet_seconds": 3, "profiles": {}}}})
    assert "profiles.a.quiet_seconds: no such setting here; it belongs at the top of config.json" in said
    assert "profiles.a.profiles: no such setting here" in said


@pytest.mark.parametrize("content", ["", "{", '{"epochs": 3,}', "\x00", '{"epochs": 3} x'])
def test_what_is_not_json_is_said_with_its_place(tmp_path, content):
    assert "is not JSON" in refused(tmp_path, content)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"x"'])
def test_json_that_is_no_object_is_refused(tmp_path, content):
    assert "one JSON object" in refused(tmp_path, content)


def test_what_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"model": "\xff"}')
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(path)


def test_a_setting_that_is_given_twice_is_refused(tmp_path):
    for content in ('{"epochs": 1, "epochs": 2}', '{"profiles": {"x": {"epochs": 1, "epochs": 1}}}'):
        assert "epochs is given twice" in refused(tmp_path, content)


def test_json_nested_too_deep_is_a_config_error(tmp_path):
    """An override comes from anyone who can write to the inbox: no content may end the daemon."""
    with pytest.raises(ConfigError):
        read_overrides(written(tmp_path, '{"seed":' * 50_000, "x.config.json"))


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("epochs", 0),
        ("epochs", -1),
        ("max_length", 15),
        ("lora_alpha", 0),
        ("lora_dropout", 1),
        ("tuning", "lora-2bit"),
        ("dtype", "int8"),
        ("target_modules", []),
        ("target_modules", "some"),
        ("max_bad_rows", 1.1),
        ("duplicates", "maybe"),
        ("seed", -1),
        ("model", ""),
        ("model", None),
        ("profiles", {"a": 3}),
        ("profiles", None),
        ("learning_rate", -1.0),
        ("learning_rate", "fast"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(tmp_path, key, value):
    assert key in refused(tmp_path, {key: value})


@pytest.mark.parametrize("key", ["epochs", "learning_rate", "weight_decay", "quiet_seconds", "checkpoint_minutes"])
@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_numbers_that_are_none_are_refused(tmp_path, key, number):
    """JSON has neither, but Python's parser takes both."""
    refused(tmp_path, f'{{"{key}": {number}}}')


# -- the alias


@pytest.mark.parametrize(("use_qlora", "tuning"), [(True, "qlora"), (False, "lora")])
def test_use_qlora_is_an_alias_of_tuning(tmp_path, use_qlora, tuning):
    config = load_config(written(tmp_path, {"use_qlora": use_qlora}))
    assert config.tuning == tuning
    assert config.use_qlora is None


def test_use_qlora_null_says_nothing(tmp_path):
    assert load_config(written(tmp_path, {"use_qlora": None, "tuning": "full"})).tuning == "full"


@pytest.mark.parametrize("given", [{"use_qlora": True, "tuning": "qlora"}, {"use_qlora": False, "tuning": "auto"}])
def test_the_alias_beside_the_same_or_auto_is_fine(tmp_path, given):
    assert load_config(written(tmp_path, given)).tuning in {"qlora", "lora"}


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("use_rslora", True), ("resume_adapter", "latest")])
def test_a_full_tuning_takes_no_adapter_settings(tmp_path, key, value):
    assert key in refused(tmp_path, {"tuning": "full", key: value})
    assert key in refused(tmp_path, {key: value, "profiles": {"whole": {"tuning": "full"}}})
    assert load_config(written(tmp_path, {"tuning": "full", "use_dora": False})).tuning == "full"


@pytest.mark.parametrize("given", [{"use_qlora": True, "tuning": "lora"}, {"use_qlora": False, "tuning": "lora-8bit"}])
def test_the_alias_may_not_contradict_tuning(tmp_path, given):
    assert "contradicts" in refused(tmp_path, given)


# -- top level, profile, override


def config_of(**values: object) -> Config:
    return Config(**values)


def test_a_profile_goes_over_the_top_level_and_an_override_over_both():
    config = config_of(epochs=1, batch_size=2, seed=3, profiles={"p": {"batch_size": 20, "seed": 30}})
    settings = resolve(config, "p", {"seed": 300})
    assert (settings.epochs, settings.batch_size, settings.seed) == (1, 20, 300)


def test_without_a_profile_the_profiles_do_not_count():
    assert resolve(config_of(seed=3, profiles={"p": {"seed": 30}}), "", {}).seed == 3


def test_nested_predictions_are_merged_key_by_key():
    config = config_of(predictions={"samples": 1}, profiles={"p": {"predictions": {"max_new_tokens": 7}}})
    settings = resolve(config, "p", {"predictions": {"samples": 5}})
    assert (settings.predictions.samples, settings.predictions.max_new_tokens) == (5, 7)


def test_a_list_is_replaced_and_not_merged():
    settings = resolve(config_of(target_modules=["q_proj"]), "", {"target_modules": ["v_proj"]})
    assert settings.target_modules == ["v_proj"]


def test_null_in_an_override_goes_over_a_value():
    assert resolve(config_of(system_prompt="Be brief."), "", {"system_prompt": None}).system_prompt is None


@pytest.mark.parametrize(
    ("top", "profile", "override", "tuning"),
    [
        ({"tuning": "lora"}, {"use_qlora": True}, {}, "qlora"),
        ({"use_qlora": True}, {"tuning": "full"}, {}, "full"),
        ({"use_qlora": True}, {}, {"use_qlora": False}, "lora"),
        ({"tuning": "full"}, {"use_qlora": True}, {"tuning": "lora-8bit"}, "lora-8bit"),
        ({"tuning": "full"}, {"use_qlora": None}, {}, "full"),
    ],
)
def test_on_a_higher_floor_the_alias_replaces_and_does_not_contradict(top, profile, override, tuning):
    assert resolve(config_of(**top, profiles={"p": profile}), "p", override).tuning == tuning


def test_a_contradiction_inside_a_profile_is_refused(tmp_path):
    assert "profiles.p" in refused(tmp_path, {"profiles": {"p": {"use_qlora": True, "tuning": "full"}}})


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no profile 'c'.*a, b"):
        resolve(config_of(profiles={"b": {}, "a": {}}), "c", {})


def test_a_bad_override_is_said_with_all_its_errors_and_its_file():
    with pytest.raises(ConfigError) as caught:
        resolve(config_of(), "", {"epochs": 0, "speed": 1}, where="x.config.json")
    assert str(caught.value).startswith("x.config.json: ")
    assert "epochs" in str(caught.value)
    assert "speed: no such setting" in str(caught.value)


# -- override files


def test_an_override_is_read_as_it_is(tmp_path):
    assert read_overrides(written(tmp_path, {"epochs": 2}, "x.config.json")) == {"epochs": 2}


@pytest.mark.parametrize("key", ["trust_remote_code", "eval_file", "resume_adapter"])
def test_an_override_may_not_allow_code_or_name_paths(tmp_path, key):
    with pytest.raises(ConfigError, match=f"may not set {key}"):
        read_overrides(written(tmp_path, {key: False, "epochs": 2}, "x.config.json"))


@pytest.mark.parametrize("key", ["trust_remote_code", "eval_file", "resume_adapter"])
def test_a_profile_may_set_what_an_override_may_not(tmp_path, key):
    value = True if key == "trust_remote_code" else "held-out.jsonl"
    config = load_config(written(tmp_path, {"profiles": {"p": {key: value}}}))
    assert getattr(resolve(config, "p", {}), key) == value


@pytest.mark.parametrize("key", ["quiet_seconds", "duplicates", "profiles", "$schema"])
def test_an_override_cannot_change_the_daemon(key):
    with pytest.raises(ConfigError, match="no such setting"):
        resolve(config_of(), "", {key: 1})


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_an_override_that_is_no_object_is_refused(tmp_path, content):
    with pytest.raises(ConfigError):
        read_overrides(written(tmp_path, content, "x.config.json"))


# -- stored settings


def test_settings_survive_being_stored():
    settings = resolve(config_of(use_qlora=True, predictions={"samples": 2}), "", {})
    stored = json.loads(json.dumps(settings.model_dump()))
    assert settings_from(stored, where="job.json") == settings


def test_the_first_rung_is_what_the_settings_ask_for():
    rung = config_of(batch_size=3, gradient_accumulation=5, max_length=64, tuning="lora").training().first_rung()
    assert rung.as_dict() == {
        "batch_size": 3,
        "gradient_accumulation": 5,
        "activation_checkpointing": False,
        "tuning": "lora",
        "max_length": 64,
        "micro_batch_tokens": 0,
    }


@pytest.mark.parametrize(
    ("changes", "rows", "accumulation"),
    [
        ({"effective_batch": 12}, 6, 2),  # the largest divisor that batch_size 8 allows
        ({"effective_batch": 4}, 4, 1),
        ({"effective_batch": 7, "batch_size": 4}, 1, 7),
        ({"batch_size": "auto"}, 8, 1),
        ({"batch_size": "auto", "gradient_accumulation": 4}, 32, 1),
        ({"batch_size": "auto", "effective_batch": 5}, 5, 1),
    ],
)
def test_the_effective_batch_is_what_was_asked_for(changes, rows, accumulation):
    rung = config_of(**changes).training().first_rung()
    assert (rung.batch_size, rung.gradient_accumulation) == (rows, accumulation)


@pytest.mark.parametrize("given", [{}, {"eval_file": "x.jsonl"}])
def test_the_best_step_is_not_published_unmeasured(tmp_path, given):
    """Whether rows are held out is seen when a file is there: one may come with the data."""
    assert "eval_steps" in refused(tmp_path, {"publish": "best", **given})
    settings = {"publish": "best", "eval_steps": 10}
    assert load_config(written(tmp_path, settings)).publish == "best"


def test_the_effective_batch_is_said_in_one_way():
    with pytest.raises(ValueError, match="leave one of them out"):
        config_of(effective_batch=8, gradient_accumulation=2)


# -- what is committed


def test_the_committed_schema_is_the_one_of_the_code():
    assert (REPOSITORY / "config.schema.json").read_text() == json_schema()


def test_the_committed_config_is_the_starter_and_valid():
    assert (REPOSITORY / "config.json").read_text() == starter()
    config = load_config(REPOSITORY / "config.json")
    assert config.training() == Config().training()


def test_every_key_of_the_schema_has_a_description():
    schema = json.loads(json_schema())
    tables = {"config": schema, **schema["$defs"]}
    keys = {
        f"{table}.{key}": value for table, content in tables.items() for key, value in content["properties"].items()
    }
    assert "config.profiles" in keys
    assert "TrainingSettings.lora_r" in keys
    assert [name for name, value in keys.items() if not value.get("description")] == []


def test_the_schema_resolves_its_own_references():
    schema = json.loads(json_schema())

    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [ref for inner in value.values() for ref in references(inner)]
        return [ref for inner in value for ref in references(inner)] if isinstance(value, list) else []

    names = {ref.removeprefix("#/$defs/") for ref in references(schema)}
    assert "TrainingSettings" in names
    assert names <= schema["$defs"].keys()


def test_the_schema_knows_exactly_the_keys_that_are_read():
    schema = json.loads(json_schema())
    read = {field.alias or name for name, field in Config.model_fields.items()}
    assert schema["properties"].keys() == read
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TrainingSettings"]["additionalProperties"] is False


@pytest.mark.parametrize("model", ["/etc/model", "./model", "../model", "~/model"])
def test_an_override_may_not_name_a_folder_as_its_model(tmp_path, model):
    with pytest.raises(ConfigError, match="may not name a folder"):
        read_overrides(written(tmp_path, {"model": model}, "x.config.json"))


def test_an_override_may_not_choose_whose_code_is_trusted():
    config = Config(model="mine/custom", trust_remote_code=True)
    with pytest.raises(ConfigError, match="may not choose the model"):
        resolve(config, "", {"model": "somebody/else"})
    assert resolve(config, "", {"epochs": 2}).model == "mine/custom"


def test_a_setting_that_is_nearly_right_is_suggested(tmp_path):
    with pytest.raises(ConfigError, match="learnig_rate: no such setting; did you mean learning_rate"):
        load_config(written(tmp_path, {"learnig_rate": 1}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rft": {"sample": 4}}, "rft.sample: no such setting; did you mean rft.samples?"),
        ({"hybrid": {"reward_wieght": 0.5}}, "did you mean hybrid.reward_weight?"),
        ({"rft": {"epochs": 4}}, "rft.epochs: no such setting$"),
        ({"recipe": "rtf"}, "recipe: .* did you mean rft?"),
        ({"recipe": "Distil"}, "recipe: .* did you mean distill?"),
        ({"judge": {"kind": "num"}}, "judge.kind: .* did you mean number?"),
        ({"judge": "number"}, "judge: must be a table"),
    ],
    ids=str,
)
def test_a_recipes_settings_and_choices_that_are_nearly_right_are_suggested(tmp_path, given, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        load_config(written(tmp_path, given))


def test_a_value_that_fits_no_kind_is_one_fault(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, {"tuning": "QLORA"}))
    assert "holds a setting that" in str(caught.value)
    assert str(caught.value).count("tuning:") == 1
