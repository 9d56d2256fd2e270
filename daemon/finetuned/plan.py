"""`finetuned plan`: ask a process that has torch what a training would need, and print it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetuned.by_hand import first_gpu, models_folder
from finetuned.config import Config, TrainingSettings, load_config, resolve, settings_from
from finetuned.errors import ConfigError, DataError, FinetunedError, HomeError, ModelError
from finetuned.home import find_home
from finetuned.launchers.local import trainer_environment

_SHOWN = 2**20  # bytes
_ERRORS: tuple[type[FinetunedError], ...] = (ConfigError, DataError, ModelError)


def plan_file(file: Path, *, base_dir: Path | None, profile: str = "", model: str | None = None) -> dict[str, Any]:
    """Predict with the settings of the base directory, or the defaults where there is none. Raises FinetunedError."""
    try:
        home = find_home(base_dir)
    except HomeError:
        if base_dir or os.environ.get("FINETUNED_HOME"):
            raise
        config, root, models = Config(), Path.cwd(), models_folder()
    else:
        config, root, models = load_config(home.config_file), home.root, home.models
        models.mkdir(parents=True, exist_ok=True)
    settings = resolve(config, profile, {}, where=str(root / "config.json"))
    if model:
        settings = settings_from({**settings.model_dump(), "model": model}, where="the command line")
    return predict(file, settings, base_dir=root, models=models, gpu=first_gpu())


def predict(
    file: Path, settings: TrainingSettings, *, base_dir: Path, models: Path, gpu: str | None, memory: int | None = None
) -> dict[str, Any]:
    """Ask a process with a trainer's environment. `memory`, in bytes, stands in for what the machine has."""
    order = {
        "file": str(file.expanduser().resolve()),
        "settings": settings.model_dump(),
        "base_dir": str(base_dir),
        "models": str(models),
        "memory": memory,
    }
    environment, _ = trainer_environment(gpu)
    process = subprocess.run(
        [sys.executable, "-m", "finetuned.trainer.plan"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    try:
        answer = json.loads(process.stdout.rsplit("\n", 2)[-2])
    except (ValueError, IndexError):
        raise FinetunedError(
            f"the prediction broke off: {process.stderr.strip()[-2000:]}", where=str(file), remedy="Train to find out."
        ) from None
    if "error" in answer:
        said = answer["error"]
        kind = next((kind for kind in _ERRORS if said["code"] == kind.code), DataError)
        raise kind(said["what"], where=said["where"], remedy=said["remedy"], code=said["code"])
    facts: dict[str, Any] = answer["plan"]
    return facts


def render(facts: dict[str, Any]) -> str:
    """Give the table and the sentences under it."""
    parts = {name.replace("_", " "): value for name, value in facts["parts_bytes"].items()}
    parts[f"correction by {facts['correction']:.2f}"] = facts["peak_bytes"] - facts["predicted_bytes"]
    parts |= {"predicted peak": facts["peak_bytes"], "memory there is": facts["memory_bytes"]}
    width = max(map(len, parts))
    lines = [f"{facts['file']}: {facts['data_summary']}", *(f"  {line}" for line in facts["data_sentences"]), ""]
    lines += [f"{'part':<{width}}  {'MiB':>9}"]
    lines += [f"{name:<{width}}  {value / _SHOWN:>9,.0f}" for name, value in parts.items()]
    bound = facts["rung"]["micro_batch_tokens"]
    lines += [
        "",
        f"correction: {facts['corrected_by']}; activations {facts['counted']}",
        f"model: {facts['model']}, {facts['trained_parameters']:,} parameters trained; {facts['device']}",
        f"rung: {facts['rung_name']}: {facts['reason']}",
        f"micro-batch: at most {facts['rung']['batch_size']} rows{f' and {bound} tokens' if bound else ''}",
        f"steps: {facts['steps']}, {facts['tokens']:,} tokens of which {facts['supervised_tokens']:,} supervised",
        f"time: {facts['minutes']:.1f} minutes at {facts['tokens_per_second']:,.0f} tokens/s ({facts['speed_from']})",
    ]
    return "\n".join(lines)
