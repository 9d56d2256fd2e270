"""The command line: parse, dispatch, exit codes. Each verb imports what it needs by itself, so that `--help` is
instant.

Exit codes: 0 done, 1 a job or an evaluation failed, 2 used wrongly, 78 the configuration, the base directory or a file
for the inbox cannot be used.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetuned import __version__
from finetuned.judges import KINDS

if TYPE_CHECKING:
    from finetuned.home import Home

_UNUSABLE = 78


def _base_dir(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--base-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="The base directory; else $FINETUNED_HOME, else the current folder.",
    )(command)


def _set(help_: str) -> Callable[..., Any]:
    return click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=help_)


def _home(base_dir: Path | None) -> Home:
    from finetuned.home import find_home

    return find_home(base_dir)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="finetuned")
def cli() -> None:
    """Drop a JSONL file into inbox/, find an adapter in adapters/."""


def main() -> None:
    """Run the command line; an error that a user can mend is a sentence, not a traceback."""
    from finetuned.errors import FinetunedError

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's letters may be fewer than an answer's
    try:
        cli(standalone_mode=True, color=False if "NO_COLOR" in os.environ else None)
    except FinetunedError as error:
        click.echo(f"finetuned: {error}", err=True)
        sys.exit(_UNUSABLE)
    except PermissionError as error:
        whose = "Do it as the user to whom the base directory belongs."
        click.echo(f"finetuned: {error.filename}: {error.strerror}. {whose}", err=True)
        sys.exit(_UNUSABLE)


@cli.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path, file_okay=False))
def init(folder: Path) -> None:
    """Make FOLDER a base directory; the current one if none is named."""
    from finetuned.base_directory import make_base_directory
    from finetuned.config import starter
    from finetuned.durable import OTHERS_NOTHING
    from finetuned.home import Home

    os.umask(OTHERS_NOTHING)
    home = Home(folder.expanduser().resolve())
    make_base_directory(home, starter())
    click.echo(
        f"{home.root} is ready. Edit {home.config_file.name}, start `finetuned run --base-dir {folder}`, "
        f"then `cp data.jsonl {folder / 'inbox'}/`."
    )


@cli.command()
@_base_dir
@click.option(
    "--once", is_flag=True, help="End when the inbox is empty and every job is finished; exit 1 if one failed."
)
def run(base_dir: Path | None, once: bool) -> None:  # noqa: FBT001, click passes options by name
    """Be the daemon: watch inbox/ and train what is dropped there."""
    from finetuned.durable import OTHERS_NOTHING
    from finetuned.logs import set_up_logging
    from finetuned.service import Service

    os.umask(OTHERS_NOTHING)
    home = _home(base_dir)
    home.logs.mkdir(parents=True, exist_ok=True)
    set_up_logging(home.logs)
    sys.exit(Service(home, once=once).run())


@cli.command()
@_base_dir
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--watch", is_flag=True, help="Show it anew every second, until Ctrl-C.")
def status(base_dir: Path | None, as_json: bool, watch: bool) -> None:  # noqa: FBT001
    """Show the queue, the running job and the last results."""
    from finetuned.status import gather, render

    home = _home(base_dir)
    while True:
        facts = gather(home)
        if watch and not as_json:
            click.clear()
        click.echo(json.dumps(facts, indent=None if watch else 2, ensure_ascii=False) if as_json else render(facts))
        if not watch:
            return
        time.sleep(1)


@cli.command()
@_base_dir
def top(base_dir: Path | None) -> None:
    """Show queue, curves and answers as they change; keys pause, cancel and move. One frame in a pipe."""
    from finetuned.top import show

    show(_home(base_dir))


@cli.command()
@_base_dir
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--profile", default="", help="A profile of config.json, as inbox/NAME/ takes it.")
@_set("A training setting for these files alone; repeatable.")
@click.option(
    "--eval-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Held-out rows for one file."
)
def add(
    base_dir: Path | None, files: tuple[Path, ...], profile: str, settings: tuple[str, ...], eval_file: Path | None
) -> None:
    """Copy FILES into the inbox, each whole or not at all, with settings and held-out rows of their own. The others are
    taken where one is refused.
    """
    from finetuned.drop import add as drop
    from finetuned.drop import parse_settings
    from finetuned.errors import DataError

    if eval_file and len(files) > 1:
        raise click.UsageError("--eval-file belongs to one file; add the others by themselves.")
    given, refused = parse_settings(settings), False
    for file in files:
        try:
            click.echo(drop(_home(base_dir), file, profile=profile, settings=given, held_out=eval_file))
        except DataError as error:
            click.echo(f"finetuned: {error}", err=True)
            refused = True
    sys.exit(_UNUSABLE if refused else 0)


@cli.command()
@_base_dir
def pause(base_dir: Path | None) -> None:
    """Start no job; each that runs writes a checkpoint and leaves its GPU."""
    _order(base_dir, "pause")


@cli.command()
@_base_dir
def resume(base_dir: Path | None) -> None:
    """Start jobs again; one that was stopped goes on from its checkpoint."""
    _order(base_dir, "resume")


@cli.command()
@_base_dir
@click.argument("job")
def cancel(base_dir: Path | None, job: str) -> None:
    """Stop JOB (its id, or the beginning of it); its file goes to archive/failed/."""
    _order(base_dir, "cancel", job)


@cli.command()
@_base_dir
@click.argument("job")
def retry(base_dir: Path | None, job: str) -> None:
    """Try a failed or cancelled JOB again, from its checkpoint and with config.json as it is now."""
    _order(base_dir, "retry", job)


@cli.command()
@_base_dir
@click.argument("job")
@click.option("--first", "turn", flag_value="first", help="Before all others.")
@click.option("--last", "turn", flag_value="last", help="Behind all others.")
@click.option("--before", metavar="OTHER", help="Right before this other job.")
def move(base_dir: Path | None, job: str, turn: str | None, before: str | None) -> None:
    """Change the turn of a waiting JOB."""
    if (turn is None) is (before is None):
        raise click.UsageError("Say --first or --last, or --before another one.")
    _order(base_dir, turn or "before", job, before=before or "")


def _order(base_dir: Path | None, verb: str, job: str = "", *, before: str = "") -> None:
    from finetuned.control import order
    from finetuned.spool.orders import Verb

    click.echo(order(_home(base_dir), Verb(verb), job, before=before))


@cli.command()
@_base_dir
@click.argument("job", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.option("-n", "--lines", default=40, show_default=True, help="Lines to begin with.")
def logs(base_dir: Path | None, job: str | None, follow: bool, lines: int) -> None:  # noqa: FBT001
    """Show the daemon's log, or that of one JOB (its id, or the beginning of it)."""
    from finetuned.tail import find_log, tail

    for line in tail(lambda: find_log(_home(base_dir), job), lines=lines, follow=follow):
        click.echo(line)


@cli.command()
@_base_dir
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def predictions(base_dir: Path | None, job: str, as_json: bool) -> None:  # noqa: FBT001
    """Show what the model of JOB answered before, while and after it learned."""
    from finetuned.answers import gather, render

    facts = gather(_home(base_dir), job)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else render(facts))


@cli.command()
@_base_dir
@click.argument("job")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The picture to write; its ending says of which kind: png, svg, pdf.",
)
def plot(base_dir: Path | None, job: str, output: Path) -> None:
    """Draw the losses and the learning rate of JOB over its steps."""
    from finetuned.plot import plot_job

    click.echo(plot_job(_home(base_dir), job, output))


@cli.command()
@_base_dir
@click.option("--host", help="Address to listen on, in place of web.host in config.json.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on, in place of web.port; 0: any.")
@click.option("--with-daemon", is_flag=True, help="End when standard input does; for the daemon.")
def web(base_dir: Path | None, host: str | None, port: int | None, with_daemon: bool) -> None:  # noqa: FBT001
    """Be the control centre: pages in the browser, at http://127.0.0.1:7860. The daemon starts it by itself."""
    from finetuned.config import load_config
    from finetuned.durable import OTHERS_NOTHING
    from finetuned.errors import HomeError

    os.umask(OTHERS_NOTHING)
    home = _home(base_dir)
    if host is None or port is None:  # told both, it starts where config.json is broken, too, and there it is mended
        settings = load_config(home.config_file).web
        host, port = settings.host if host is None else host, settings.port if port is None else port
    try:
        from finetuned.web.serve import serve
    except ModuleNotFoundError as error:
        raise HomeError(
            f"the control centre needs {error.name}, which is not installed",
            remedy="Install it with `pip install 'finetuned[web]'`.",
            code="no_web",
        ) from error
    serve(home, host=host, port=port, with_daemon=with_daemon)


@cli.command()
@_base_dir
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def doctor(base_dir: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Check this machine and the base directory; exit 1 if something must be mended."""
    from finetuned.doctor.examine import examine, render
    from finetuned.doctor.finding import Verdict

    findings = examine(base_dir)
    facts = [finding.as_dict() for finding in findings]
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else render(findings))
    sys.exit(any(finding.verdict is Verdict.FAIL for finding in findings))


@cli.group()
def service() -> None:
    """Run the daemon under systemd."""


@service.command()
@_base_dir
@click.option("--user", is_flag=True, help="A service of your own, without root and without the sandbox.")
@click.option("--run-as", metavar="USER", help="Who the daemon is; else who owns the base directory.")
@click.option(
    "--output-dir", type=click.Path(path_type=Path, file_okay=False), help="Write the units there, to look at them."
)
@click.option("--print", "only_print", is_flag=True, help="Write nothing, show the units.")
def install(
    base_dir: Path | None,
    user: bool,  # noqa: FBT001
    run_as: str | None,
    output_dir: Path | None,
    only_print: bool,  # noqa: FBT001
) -> None:
    """Write systemd units with this machine's paths, and say what to run next. Starts and enables nothing."""
    from finetuned.units import install_units

    sys.exit(install_units(_home(base_dir), user=user, run_as=run_as, folder=output_dir, only_print=only_print))


@cli.command()
@_base_dir
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--profile", default="", help="A profile of config.json, as inbox/NAME/ takes it.")
@click.option("--model", help="A hub id, a folder, or smollm2-135m, in place of the configured one.")
@click.option(
    "--eval-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Its held-out rows; else x.eval.jsonl beside x.jsonl.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def check(file: Path, *, as_json: bool, eval_file: Path | None, **options: Any) -> None:
    """Say what is wrong or odd in FILE, where, and what the model would learn from it; exit 1 if it is refused."""
    from finetuned.check import check_file, render
    from finetuned.errors import DataError

    try:
        facts = check_file(file, held_out=eval_file, **options)
    except DataError as error:
        facts = {"file": str(file), "verdict": "refused", "reason": error.as_dict(), "unchecked": ""}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        text = render(facts, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        letters = sys.stdout.encoding  # a terminal's may be fewer than a file's
        click.echo(text.encode(letters, "backslashreplace").decode(letters), err="format" not in facts)
    sys.exit(facts["verdict"] != "usable")


@cli.command()
@_base_dir
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--profile", default="", help="A profile of config.json, as inbox/NAME/ takes it.")
@click.option("--model", help="A hub id, a folder, or smollm2-135m, in place of the configured one.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def plan(base_dir: Path | None, file: Path, profile: str, model: str | None, as_json: bool) -> None:  # noqa: FBT001
    """Predict memory and time of a training on FILE, and the rung of the ladder it would start on."""
    from finetuned.errors import DataError, ModelError
    from finetuned.plan import plan_file, render

    try:
        facts = plan_file(file, base_dir=base_dir, profile=profile, model=model)
    except (DataError, ModelError) as error:
        click.echo(f"finetuned: {error}", err=True)
        sys.exit(1)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else render(facts))


@cli.command()
@_base_dir
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write.")
@click.option("--profile", default="", help="A profile of config.json, as inbox/NAME/ takes it.")
@click.option("--model", help="A hub id, a folder, or smollm2-135m, in place of the configured one.")
def datagen(base_dir: Path | None, file: Path, out: Path, profile: str, model: str | None) -> None:
    """Let the model answer FILE's questions, and write the answers that are right as chats to train on."""
    from finetuned.datagen import make_file
    from finetuned.errors import DataError, ModelError

    try:
        made = make_file(file, out, base_dir=base_dir, profile=profile, model=model)
    except (DataError, ModelError) as error:
        click.echo(f"finetuned: {error}", err=True)
        sys.exit(1)
    click.echo(f"{out}: {made['sentence']}")
    if made["advice"]:
        click.echo(f"finetuned: {out}: nothing was kept. {made['advice']}", err=True)
        sys.exit(1)


@cli.command()
@click.option(
    "--dataset", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A JSONL file."
)
@click.option("--model", show_default="smollm2-135m", help="A hub id, a folder, or smollm2-135m.")
@click.option(
    "--output-dir", required=True, type=click.Path(path_type=Path, file_okay=False), help="Where the adapter goes."
)
@click.option("--epochs", type=float)
@click.option("--max-steps", type=int)
@click.option("--eval-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Held-out rows.")
@click.option("--eval-steps", type=int)
@click.option("--batch-size", type=int)
@click.option("--gradient-accumulation", type=int)
@click.option("--learning-rate", type=float)
@click.option(
    "--use-qlora/--no-qlora", default=None, help="4-bit base weights; without either, what suits the machine."
)
@click.option("--max-length", type=int)
@click.option("--lora-r", type=int)
@click.option("--lora-alpha", type=float)
@click.option(
    "--resume-adapter", type=click.Path(path_type=Path, exists=True, file_okay=False), help="An adapter to train on."
)
@click.option("--system-prompt", help="For rows that have none; an empty text for none at all.")
@click.option(
    "--predictions-enabled/--no-predictions-enabled", default=None, help="Ask held-out questions while it learns."
)
@click.option("--predictions-sample-frequency", metavar="WHEN", help="eval, epoch, or every so many steps.")
@click.option(
    "--report-to",
    multiple=True,
    metavar="TRACKER",
    help="tensorboard, wandb, mlflow, ...; repeatable. Files: logs/tracking/.",
)
@click.option("--seed", type=int)
@click.option(
    "--recipe", type=click.Choice(["sft", "distill", "rft", "hybrid"]), help="What is learned; sft if none is named."
)
@click.option("--teacher", help="The model that recipe distill learns from, named as --model is.")
@click.option(
    "--benchmark",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Rows to measure the adapter by, beside its base model.",
)
@_set("Any other setting of config.json's that decides a training: rft.samples=8, say; repeatable.")
@click.option("--job-id", help="A name for this training.")
@click.option("--skip-validation", is_flag=True, help="Train on the good rows, however many are bad.")
@click.option("--yes", is_flag=True, help="Do not ask before replacing what is in the output folder.")
def train(**options: Any) -> None:
    """Train one file by hand, without the daemon and without config.json."""
    from finetuned.by_hand import train_by_hand

    sys.exit(train_by_hand(**options))


@cli.command()
@_base_dir
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Let the base model answer first, each time.")
@click.option("--model", help="The base model, where it is not where the adapter says.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most probable answer; above, answers are drawn.",
)
def chat(base_dir: Path | None, adapter: Path | None, **options: Any) -> None:
    """Talk to ADAPTER, a folder or a name in adapters/; to the newest if none is named.

    Ctrl-C ends an answer, Ctrl-D the chat. From a pipe each line is a question of its own.
    """
    from finetuned.talk import talk

    talk(adapter, base_dir=base_dir, **options)


@cli.command("eval")
@_base_dir
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Rows that were not trained on.",
)
@click.option("--model", help="Without ADAPTER, the model to measure; with it, its base where that lies elsewhere.")
@click.option(
    "--against", type=click.Path(path_type=Path), help="Another adapter, to be compared question by question."
)
@click.option("--judge", "kind", type=click.Choice(["auto", *KINDS]), help="How an answer is told to be right.")
@click.option("--tolerance", type=click.FloatRange(min=0), help="number: how far off it may be, as a share.")
@click.option("--pattern", help="regex: its first group, or all of it, is the answer.")
@click.option("--choices", metavar="A,B,...", help="choice: the answers that there are.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer; else benchmark_tokens.")
@click.option(
    "--trained-on",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What it was trained on, where the archive does not have that; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines, with every answer.")
def evaluate(adapter: Path | None, as_json: bool, choices: str | None, **options: Any) -> None:  # noqa: FBT001
    """Measure ADAPTER beside its base model: loss, accuracy, how sure both are, and what it had seen before."""
    from finetuned.errors import DataError, ModelError
    from finetuned.measure import judge_named, measure, render

    given = {name: options.pop(name) for name in ("kind", "tolerance", "pattern")}
    judge = judge_named(**given, choices=choices.split(",") if choices else None)
    try:
        facts = measure(adapter, judge=judge, **options)
    except (DataError, ModelError) as error:
        click.echo(f"finetuned: {error}", err=True)
        sys.exit(1)
    text = json.dumps(facts, indent=2, ensure_ascii=False) if as_json else render(facts)
    letters = sys.stdout.encoding  # a terminal's may be fewer than a model's
    click.echo(text.encode(letters, "backslashreplace").decode(letters))


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--output-dir", required=True, type=click.Path(path_type=Path, file_okay=False), help="Where the model goes."
)
@click.option("--model", help="The base model, where it is not where the adapter says.")
@click.option("--dtype", type=click.Choice(["bf16", "float32"]), default="bf16", show_default=True)
@click.option("--yes", is_flag=True, help="Do not ask before replacing a merged model.")
def merge(adapter: Path, output_dir: Path, model: str | None, dtype: str, yes: bool) -> None:  # noqa: FBT001
    """Merge ADAPTER into its base model: a folder that needs no PEFT."""
    from finetuned.export import merge_adapter

    sys.exit(merge_adapter(adapter, output_dir, model=model, dtype=dtype, yes=yes))


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write.")
@click.option("--model", help="The base model, where it is not where the adapter says.")
def gguf(adapter: Path, output: Path, model: str | None) -> None:
    """Write ADAPTER as a GGUF file, with llama.cpp's converter."""
    from finetuned.export import convert_adapter

    sys.exit(convert_adapter(adapter, output, model=model))


@cli.command()
@click.option(
    "--base-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder for it; else a new one in the system's temporary folder.",
)
@click.option("--web", is_flag=True, help="Leave the control centre open at the end, until Ctrl-C.")
def demo(base_dir: Path | None, web: bool) -> None:  # noqa: FBT001
    """Show the main job: a real daemon, a real model, a file in the inbox."""
    from finetuned.demo import run_demo

    sys.exit(run_demo(base_dir, web=web))
