"""config.json: every setting with its meaning, its bounds and its default. All errors are reported at once.

Training settings stand at the top level, may be changed by a profile (`inbox/NAME/`), and then by an override
file beside the data (`x.config.json`). An override travels with data and may come from anyone who can write to the
inbox, so it cannot name paths or allow foreign code.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from finetuned import config_errors
from finetuned.engine_settings import Ray, Slurm
from finetuned.errors import ConfigError
from finetuned.fallback import Rung
from finetuned.findings import Warned
from finetuned.recipe_settings import Distill, Hybrid, PositiveInt, Rft, Strict
from finetuned.section_settings import JudgeSettings, OnFinish, Predictions, Web

NOT_IN_OVERRIDES = frozenset(
    {"launcher", "trust_remote_code", "benchmark", "eval_file", "resume_adapter", "priority", "report_to"}
)
WHERE = frozenset({"launcher", "gpus_per_job"})  # where a job is trained, which makes no other training
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*(/[\w-]+(\.[\w-]+)*)?", re.ASCII)
_FOREIGN = frozenset({"model", "revision", "teacher", "teacher_revision"})  # whose code may be run
LATEST = "latest"  # as resume_adapter

_AUTO_ROWS = 8  # in one optimizer step, where batch_size is auto and effective_batch does not say

Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # of accelerate
Tuning = Literal["qlora", "lora-8bit", "lora", "full"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainingSettings(Strict):
    """Everything that decides how one file is trained."""

    priority: int = Field(
        0, ge=-100, le=100, description="Jobs of a higher priority start first; set it in a profile, inbox/high/ say."
    )
    launcher: Literal["local", "ray", "slurm"] = Field(
        "local", description="Where jobs run: on this machine, or on a cluster of Ray or Slurm (docs/scale.md)."
    )
    gpus_per_job: PositiveInt | Literal["auto"] = Field(
        1, description="GPUs that one job is trained on; auto: as many as `finetuned plan` says that the model needs."
    )
    recipe: Literal["sft", "distill", "rft", "hybrid"] = Field(
        "sft",
        description="What is learned: sft, the rows' answers as they are; distill, from a teacher too; rft, the "
        "model's own answers that are right; hybrid, from labels and rewards.",
    )
    hybrid: Hybrid = Field(
        default_factory=Hybrid, description="Labels and rewards in one step: docs/recipes/hybrid.md."
    )
    rft: Rft = Field(default_factory=Rft, description="Rejection-sampling fine-tuning: docs/recipes/rft.md.")
    model: str = Field(
        "smollm2-135m",
        min_length=1,
        description="Base model: a hub id, a local folder, or smollm2-135m, which needs no network.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that a hub model brings. Off for good reason.")
    tuning: Tuning | Literal["auto"] = Field(
        "auto",
        description="qlora (4-bit NF4 base), lora-8bit, lora, full; auto: qlora on a GPU, lora without one.",
    )
    use_qlora: bool | None = Field(None, description="Alias: true is tuning qlora, false is tuning lora.")
    lora_r: PositiveInt = Field(16, description="Rank of the adapter: higher learns more and costs memory.")
    lora_alpha: float = Field(32, gt=0, description="Scale of the adapter; it is applied as lora_alpha / lora_r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="Layers that get an adapter: all-linear, or a list of module names."
    )
    use_rslora: bool = Field(
        False, description="Scale the adapter by lora_alpha / sqrt(lora_r): steadier at high ranks (rsLoRA)."
    )
    use_dora: bool = Field(
        False, description="Learn a magnitude beside the adapter's direction (DoRA): often better, slower."
    )
    resume_adapter: str | None = Field(
        None,
        min_length=1,
        description="Adapter to train on: a path, from the base directory if not absolute, or latest of the profile.",
    )
    teacher: str | None = Field(
        None,
        min_length=1,
        description="Model that recipe distill learns from, named as `model` is; it is never trained.",
    )
    teacher_revision: str | None = Field(None, description="Branch, tag or commit of a teacher from the hub.")
    teacher_dtype: Literal["auto", "bf16", "fp16", "float32", "4bit"] = Field(
        "auto", description="Number format of the teacher, whatever the model's; 4bit: quantised (NF4)."
    )
    teacher_device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="Where the teacher is: cpu, cuda, cuda:1; auto: beside the model."
    )
    distill: Distill = Field(
        default_factory=Distill, description="What recipe distill learns from the teacher: docs/recipes/distill.md."
    )
    system_prompt: str | None = Field(
        "You are a helpful assistant.",
        description="Put before rows that have no system message; null leaves them as they are.",
    )
    max_length: int = Field(2048, ge=16, description="Longest row in tokens; the rest is cut.")
    epochs: float = Field(3.0, gt=0, description="Times that every row is seen.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps.")
    batch_size: Annotated[int, Field(ge=1, le=2**16)] | Literal["auto"] = Field(
        8, description="Rows in one micro-batch; auto: as many as memory holds. Halved by itself when memory runs out."
    )
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=2**20,
        description="Micro-batches in one optimizer step. Doubled by itself when batch_size is halved.",
    )
    effective_batch: Annotated[int, Field(ge=1, le=2**20)] | None = Field(
        None, description="Rows in one optimizer step; null: batch_size x gradient_accumulation, 8 where that is auto."
    )
    micro_batch_tokens: PositiveInt | Literal["auto"] = Field(
        "auto", description="Most tokens in one micro-batch, a longer row stands alone; auto: what is fastest and fits."
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] | Literal["auto"] = Field(
        "auto", description="Peak learning rate; auto: 2e-4 for adapters, 1e-5 for full."
    )
    warmup_ratio: Fraction = Field(0.05, description="Share of the steps in which the learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 switches it off.")
    skip_bad_steps: int = Field(
        3,
        ge=0,
        description="Steps that may be skipped because loss or gradient exploded or is not finite; then the job ends.",
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Decides the order of rows and the adapter's first weights.")
    dtype: Literal["auto", "bf16", "fp16", "float32"] = Field(
        "auto", description="Number format of the computation; auto takes bf16 where the hardware is fast at it."
    )
    activation_checkpointing: bool = Field(False, description="Compute activations twice to save memory.")
    fallback_4bit: bool = Field(False, description="When memory runs out, the base weights may go to 4 bits.")
    fallback_max_length: bool = Field(False, description="When memory runs out, rows may be cut shorter.")
    max_bad_rows: Fraction = Field(0.01, description="Share of bad rows that are left out; with more the job fails.")
    fail_on: list[Warned] = Field(
        default_factory=list,
        description="Warnings about the data that fail the job, by their codes in docs/data.md.",
    )
    eval_file: str | None = Field(None, description="Held-out rows; a path, from the base directory if not absolute.")
    eval_fraction: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of the rows held back, chosen by their content, where no held-out file is given.",
    )
    eval_steps: PositiveInt | None = Field(
        None, description="Evaluate every so many steps; null: before the first step and after the last."
    )
    predictions: Predictions = Field(default_factory=Predictions, description="Answers read while it learns.")
    judge: JudgeSettings = Field(
        default_factory=JudgeSettings, description="How an answer is told to be right: docs/evaluation.md."
    )
    benchmark: str | None = Field(
        None,
        min_length=1,
        description="Rows that every job's model is measured by at its end, beside its base model; a path, from the "
        "base directory if not absolute.",
    )
    benchmark_tokens: PositiveInt = Field(
        256, description="Longest answer to a question of a benchmark or of `finetuned eval`, in tokens."
    )
    report_to: list[Tracker] = Field(
        default_factory=list,
        description="Trackers that get the figures too, each where it is installed; files go to logs/tracking/.",
    )
    checkpoint_steps: PositiveInt = Field(100, description="Write a checkpoint every so many steps.")
    checkpoint_minutes: float = Field(
        10.0, gt=0, description="Write one at least this often; so much work can be lost."
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Newest checkpoints kept while the job lives; the one with the best held-out loss besides."
    )
    publish: Literal["last", "best"] = Field(
        "last", description="Which step becomes the adapter: the last, or the one with the best held-out loss."
    )

    @model_validator(mode="before")
    @classmethod
    def _fold_alias(cls, data: Any) -> Any:
        """Turn `use_qlora` into `tuning`, and refuse the two when they disagree; take one code for a list of it."""
        if isinstance(data, dict) and isinstance(data.get("fail_on"), str):
            data = {**data, "fail_on": [data["fail_on"]]}
        if isinstance(data, dict) and isinstance(data.get("use_qlora"), bool):
            meant = "qlora" if data["use_qlora"] else "lora"
            if data.get("tuning", "auto") in ("auto", meant):  # else _agrees_with_tuning complains
                data = {**data, "tuning": meant, "use_qlora": None}
        return data

    @field_validator("revision", "teacher_revision")
    @classmethod
    def _stays_in_its_folder(cls, revision: str | None) -> str | None:
        """Refuse what would lead out of the folder in which the hub's library keeps revisions."""
        if revision is not None and not re.fullmatch(r"[\w+-]+([./][\w+-]+)*", revision, re.ASCII):
            raise ValueError("is no branch, tag or commit")
        return revision

    @field_validator("use_qlora")
    @classmethod
    def _agrees_with_tuning(cls, use_qlora: bool | None, info: ValidationInfo) -> bool | None:  # noqa: FBT001
        if use_qlora is not None:
            given = info.data.get("tuning")
            raise ValueError(f"{str(use_qlora).lower()} contradicts tuning {given!r}; keep one of them")
        return use_qlora

    @model_validator(mode="after")
    def _one_way_to_say_the_effective_batch(self) -> Self:
        if self.effective_batch is not None and self.gradient_accumulation != 1:
            raise ValueError("effective_batch decides gradient_accumulation; leave one of them out")
        return self

    @model_validator(mode="after")
    def _adapter_settings_have_an_adapter(self) -> Self:
        named = [name for name in ("use_rslora", "use_dora", "resume_adapter") if getattr(self, name)]
        if self.tuning == "full" and named:
            raise ValueError(f"tuning full trains no adapter, so {' and '.join(named)} cannot be met; drop one of them")
        return self

    @model_validator(mode="after")
    def _distill_has_a_teacher(self) -> Self:
        if self.recipe == "distill" and self.teacher is None:
            raise ValueError("recipe distill needs a teacher: name a model, as a hub id or a folder")
        return self

    @model_validator(mode="after")
    def _best_of_what_is_measured(self) -> Self:
        if self.publish == "best" and not self.eval_steps:
            raise ValueError("publish best needs held-out rows and eval_steps, which tell what is best")
        if self.publish == "best" and self.recipe == "rft":
            raise ValueError("publish best goes by a held-out loss, and recipe rft has answers of its own, not those")
        return self

    @model_validator(mode="after")
    def _a_soft_prompt_is_the_adapter(self) -> Self:
        named = [name for name in ("use_rslora", "use_dora", "resume_adapter") if getattr(self, name)]
        named += ["tuning full"] if self.tuning == "full" else []
        if self.soft_prompt and named:
            raise ValueError(f"hybrid.prompt_tokens trains a prompt alone, which {' and '.join(named)} cannot go with")
        return self

    @property
    def soft_prompt(self) -> int:
        """How many tokens of a soft prompt are trained in an adapter's place."""
        return self.hybrid.prompt_tokens if self.recipe == "hybrid" else 0

    def settled(self) -> Self:
        """Give them with what the recipe decides: rft trains under the prompt that its answers were made with."""
        return self.model_copy(update={"system_prompt": self.rft.prompt}) if self.recipe == "rft" else self

    def first_rung(self) -> Rung:
        """Give the top of the memory ladder, where the first attempt starts.

        A tuning of auto stays: the trainer knows the hardware and decides.
        """
        effective = self.effective_batch or self.gradient_accumulation * (
            _AUTO_ROWS if self.batch_size == "auto" else self.batch_size
        )
        most = effective if self.batch_size == "auto" else self.batch_size
        rows = next(n for n in range(min(most, effective), 0, -1) if effective % n == 0)
        return Rung(
            batch_size=rows,
            gradient_accumulation=effective // rows,
            activation_checkpointing=self.activation_checkpointing,
            tuning=self.tuning,
            max_length=self.max_length,
            micro_batch_tokens=0 if self.micro_batch_tokens == "auto" else self.micro_batch_tokens,
        )


class Config(TrainingSettings):
    """The whole of config.json: the training settings, and how the daemon behaves."""

    schema_: str | None = Field(None, alias="$schema", description="Where editors find the meaning of these keys.")
    profiles: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Named training settings; files in inbox/NAME/ use profile NAME on top of the settings above.",
    )
    quiet_seconds: float = Field(2.0, ge=0.1, description="A file is taken when it has not changed for so long.")
    rescan_seconds: float = Field(30.0, ge=1, description="Look into the inbox at least this often.")
    truncated_seconds: float = Field(
        60.0, ge=0, description="How long a file whose last line is cut off may still be growing."
    )
    empty_seconds: float = Field(3600.0, ge=0, description="How long an empty file may wait for its content.")
    duplicates: Literal["skip", "run", "fail"] = Field(
        "skip", description="What to do with a file that was trained before with the same settings."
    )
    gpus: list[int | str] | None = Field(
        None,
        min_length=1,
        description="GPUs that jobs may use, as indices of nvidia-smi or UUIDs; null: all. Others are left alone.",
    )
    remote_jobs: PositiveInt = Field(16, description="How many jobs Ray and Slurm have at once; others wait here.")
    ray: Ray = Field(default_factory=Ray, description="The cluster of launcher ray: docs/scale.md.")
    slurm: Slurm = Field(default_factory=Slurm, description="The cluster of launcher slurm: docs/scale.md.")
    share_gpus: bool = Field(
        False, description="Let jobs share a GPU where `finetuned plan` says that they fit on it together."
    )
    gpu_busy_gib: float = Field(
        2.0,
        ge=0,
        description="A GPU of which others use more than so many GiB of memory is not taken until they are done.",
    )
    gpu_sample_seconds: float = Field(10.0, ge=1, description="How often the GPUs are sampled while a job runs.")
    stop_seconds: float = Field(120.0, ge=1, description="How long a trainer may take to write its last checkpoint.")
    pause_grace: float = Field(
        60.0,
        ge=1,
        description="How long a trainer may take to leave the GPU when the queue is paused or it is cancelled.",
    )
    most_crashes: int = Field(
        3,
        ge=0,
        description="The queue pauses when so many attempts died with daemon or machine in half an hour; 0: never.",
    )
    keep_logs_days: PositiveInt = Field(90, description="Days for which logs are kept: the daemon's and the jobs'.")
    keep_failed_days: PositiveInt = Field(
        30, description="Days for which checkpoints of failed jobs are kept; their inputs are never removed."
    )
    on_finish: OnFinish = Field(default_factory=OnFinish, description="Who is told that a job has ended.")
    warm_trainer: bool = Field(
        False,
        description="Keep torch loaded in a process that trainers are forked from: each starts about 3 s sooner, "
        "for 400 MB of memory kept.",
    )

    web: Web = Field(default_factory=Web, description="The control centre in the browser: docs/web.md.")

    def training(self) -> TrainingSettings:
        """Give the training settings without profile or override."""
        return TrainingSettings(**{name: getattr(self, name) for name in TrainingSettings.model_fields})


def _settings(base: TrainingSettings, changes: dict[str, Any]) -> TrainingSettings:
    merged = base.model_dump()
    for key, value in changes.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both_tables else value
    if isinstance(changes.get("use_qlora"), bool) and "tuning" not in changes:
        merged["tuning"] = "auto"  # the alias replaces the base's tuning, it does not contradict it
    return TrainingSettings(**merged)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=str(path), remedy="Mend its permissions."
        ) from error
    return _object(content, where=str(path))


def _object(content: bytes, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content, object_pairs_hook=partial(_pairs, where=where))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"is not JSON: {error}", where=where, remedy="Mend the file; commas are the usual suspects."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError("must hold one JSON object", where=where, remedy='It begins with "{" and ends with "}".')
    return value


def _pairs(pairs: list[tuple[str, Any]], *, where: str) -> dict[str, Any]:
    """Make an object; a key that is there twice would silently be the last one."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice} is given twice", where=where, remedy="Keep one of them.")
    return value


def _invalid(lines: list[str], where: str) -> ConfigError:
    count = "a setting that" if len(lines) == 1 else f"{len(lines)} settings that"
    return ConfigError(f"holds {count} cannot be used:\n  " + "\n  ".join(lines), where=where)


def load_config(path: Path) -> Config:
    """Read config.json. Raises ConfigError with everything that is wrong in it, profiles included."""
    return _config(_read_object(path), where=str(path))


def parse_config(content: bytes, *, where: str) -> Config:
    """Read what is to become config.json, as `load_config` would."""
    return _config(_object(content, where=where), where=where)


def _config(value: dict[str, Any], *, where: str) -> Config:
    lines: list[str] = []
    config = None
    try:
        config = Config(**value)
    except ValidationError as error:
        lines = config_errors.lines(error, Config)
    base = config.training() if config else TrainingSettings()
    profiles = value.get("profiles")
    for name, changes in profiles.items() if isinstance(profiles, dict) else ():
        if isinstance(changes, dict):
            try:
                _settings(base, changes)
            except ValidationError as error:
                lines += [
                    f"profiles.{name}.{line}" for line in config_errors.lines(error, TrainingSettings, whole=Config)
                ]
    if config is None or lines:
        raise _invalid(lines, where)
    return config


def read_overrides(path: Path) -> dict[str, Any]:
    """Read `x.config.json`. Raises ConfigError if it is no JSON object or holds what an override may not set."""
    return check_overrides(_read_object(path), where=str(path))


def check_overrides(changes: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Give the changes back. Raises ConfigError if they hold what an override may not set."""
    forbidden = sorted(NOT_IN_OVERRIDES & changes.keys())
    if forbidden:
        raise ConfigError(
            f"an override may not set {', '.join(forbidden)}",
            where=where,
            remedy="Set it in config.json or in a profile there.",
        )
    for name in ("model", "teacher"):
        if changes.get(name) is not None and not _HUB_ID.fullmatch(str(changes[name])):
            raise ConfigError(
                f"an override may not name a folder as its {name}",
                where=where,
                remedy="Name a hub id, or set the folder in config.json or in a profile there.",
            )
    return changes


def resolve(config: Config, profile: str, overrides: dict[str, Any], *, where: str = "") -> TrainingSettings:
    """Give the settings of one job: the top level, then its profile, then its override.

    Raises ConfigError for an unknown profile or settings that cannot be used.
    """
    if profile and profile not in config.profiles:
        known = ", ".join(sorted(config.profiles)) or "none yet"
        raise ConfigError(
            f"there is no profile {profile!r}",
            where=where,
            remedy=f"Add it to `profiles` in config.json (there: {known}), or move the file to inbox/ itself.",
        )
    try:
        settings = _settings(config.training(), config.profiles.get(profile, {}))
        changed = _settings(settings, overrides)
    except ValidationError as error:
        raise _invalid(config_errors.lines(error, TrainingSettings, whole=Config), where) from error
    if settings.trust_remote_code and _FOREIGN & overrides.keys():
        raise ConfigError(
            "an override may not choose the model or the teacher where trust_remote_code is on",
            where=where,
            remedy="Name it in config.json or in a profile there.",
        )
    return changed


def settings_from(values: dict[str, Any], *, where: str) -> TrainingSettings:
    """Validate a job's settings as they are stored in job.json. Raises ConfigError."""
    try:
        return TrainingSettings(**values)
    except ValidationError as error:
        raise _invalid(config_errors.lines(error, TrainingSettings), where) from error


def json_schema() -> str:
    """Give the JSON Schema of config.json, as committed in config.schema.json."""
    schema = Config.model_json_schema()
    training = {"$ref": "#/$defs/TrainingSettings"}
    schema["properties"]["profiles"]["additionalProperties"] = training
    inner = TrainingSettings.model_json_schema()
    inner.pop("$defs", None)
    schema["$defs"]["TrainingSettings"] = inner
    schema["title"] = "config.json of finetuned"
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


_STARTER_KEYS = (
    "model", "tuning", "system_prompt", "max_length", "epochs", "batch_size", "gradient_accumulation",
    "learning_rate", "lora_r", "lora_alpha", "profiles",
)  # fmt: skip


def starter() -> str:
    """Give a config.json to begin with: the keys that most people change, at their defaults."""
    defaults = Config().model_dump()
    values = {"$schema": "./config.schema.json", **{key: defaults[key] for key in _STARTER_KEYS}}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
