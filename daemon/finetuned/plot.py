"""`finetuned plot`: a job's losses and learning rate as a picture. matplotlib draws, where it is installed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from finetuned.curves import Curves, curves_of, smoothed
from finetuned.errors import FinetunedError, HomeError, counted
from finetuned.events import EventType
from finetuned.found import job_named, ledger_to_read
from finetuned.home import Home

_NOISY = 60  # steps from which on a running mean is drawn over the single losses
_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9782d", "#666666"


def plot_job(home: Home, name: str, output: Path) -> str:
    """Draw to a file whose ending says how; the sentence to tell the user. Raises HomeError or FinetunedError."""
    with ledger_to_read(home) as ledger:
        job = job_named(ledger, name)
        curves = curves_of(ledger.events(job.id, EventType.METRICS))
    if not curves:
        raise HomeError(f"job {job.id} has done no step yet", remedy="`finetuned status` says where it is.")
    figure = _draw(curves, job.id)
    kinds = figure.canvas.get_supported_filetypes()
    kind = output.suffix.lower().lstrip(".")
    if kind not in kinds:
        raise FinetunedError(
            f"there is no picture of the kind {output.suffix!r}",
            where=str(output),
            remedy=f"End its name with one of {', '.join(sorted(kinds))}.",
        )
    staged = output.with_name(f".{output.name}.partial")
    try:
        figure.savefig(staged, format=kind, dpi=150)
        staged.replace(output)
    except OSError as error:
        raise HomeError(
            f"cannot be written: {error.strerror}", where=str(output), remedy="Name another --output."
        ) from error
    finally:
        with suppress(OSError):
            staged.unlink()
    return (
        f"{output}: {counted(len(curves.train_loss), 'step')} and {counted(len(curves.valid_loss), 'evaluation')} "
        f"of {job.id}"
    )


def _draw(curves: Curves, title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FinetunedError(
            "drawing needs matplotlib, which is not installed",
            where="finetuned plot",
            remedy="pip install 'finetuned[plot]'",
        ) from error
    figure = Figure(figsize=(9, 6), layout="constrained")  # inches
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    noisy = len(curves.train_loss) >= _NOISY
    if curves.train_loss:
        faint: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if noisy else {"label": "training", "linewidth": 1.5}
        if len(curves.train_loss) == 1:  # no line goes through it
            faint["marker"] = "o"
        losses.plot(*zip(*curves.train_loss, strict=True), color=_BLUE, **faint)
    if noisy:
        span = max(10, len(curves.train_loss) // 50)
        mean = smoothed(curves.train_loss, span)
        losses.plot(*zip(*mean, strict=True), color=_BLUE, label=f"training, mean of {span} steps")
    if curves.valid_loss:
        losses.plot(*zip(*curves.valid_loss, strict=True), "o-", color=_ORANGE, markersize=4, label="held out")
    if curves.learning_rate:
        rates.plot(*zip(*curves.learning_rate, strict=True), color=_GREY, linewidth=1.2)
    losses.set(title=title, ylabel="loss (nats a token)")
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False)
    return figure
