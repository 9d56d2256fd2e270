"""Recipes on tensors without content, for `rehearsal.py`: the real objectives, with a teacher that has no weights, and
with answers that are made of nothing but their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from finetuned.trainer.attention import without_flat
from finetuned.trainer.contest import Drawn
from finetuned.trainer.distill import curriculum
from finetuned.trainer.distill.teacher import Teacher
from finetuned.trainer.layout import Layout
from finetuned.trainer.model import empty_model, evaluating
from finetuned.trainer.policy import Policy
from finetuned.trainer.precision import choose
from finetuned.trainer.prompted import Prompted, parted
from finetuned.trainer.recipes import distill, hybrid, sft
from finetuned.trainer.rollouts import last_states, side_by_side
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from finetuned.config import TrainingSettings
    from finetuned.recipe_settings import Distill
    from finetuned.trainer.distill.found import Found
    from finetuned.trainer.footprint import Work

Place = Callable[[Any, torch.device], None]  # puts tensors without content in the place of a module's own
Make = Callable[[Any, Layout, Place], Any]  # an objective

_LONGEST = 256  # rows among which the longest question is looked for
_TURN = 8  # tokens of a chat template's marks, about


def maker(work: Work, rows: Sequence[Example]) -> Make:
    """Give what makes the recipe's objective around a model without content, for a micro-batch of these rows."""
    settings = work.settings
    task: Any = SimpleNamespace(
        settings=settings, train=rows, held_out=[], device=work.device, tokenizer=None, teacher=None
    )
    task.rung = SimpleNamespace(tuning=work.tuning, effective_batch=len(rows))

    def make(model: Any, layout: Layout, place: Place) -> Any:
        if work.teacher is not None:
            task.settings = settings.model_copy(update={"distill": at_its_fullest(settings.distill)})
            task.teacher = _teacher(work.teacher, layout, work.device, place, whole=looks_into_layers(settings))
            return distill.Objective(task, model, layout)
        if settings.recipe != "hybrid":
            return sft.Objective(model, layout)
        objective = hybrid.Objective(task, model, layout)
        if objective.policy is not None:
            objective._contest = _Contest(objective.prompted, objective.policy, settings)  # type: ignore[assignment]  # noqa: SLF001
        return objective

    return make


def looks_into_layers(settings: TrainingSettings) -> bool:
    """Whether student and teacher are compared layer by layer: then all of them have to be there."""
    terms = settings.distill
    weights = (terms.hidden_weight, terms.attention_weight, terms.contrastive_weight)
    return settings.recipe == "distill" and any(map(curriculum.highest, weights))


def at_its_fullest(terms: Distill) -> Distill:
    """Give them with every weight that is ever on switched on."""
    names = ("hidden_weight", "attention_weight", "contrastive_weight")
    on: dict[str, Any] = {name: curriculum.highest(getattr(terms, name)) for name in names}
    if isinstance(terms.alpha, list):
        on["alpha"] = sum(terms.alpha) / len(terms.alpha)  # labels and teacher at once
    return terms.model_copy(update=on)


def _teacher(found: Found, layout: Layout, beside: torch.device, place: Place, *, whole: bool) -> Teacher:
    """Give a teacher as if it had been loaded. Of what it keeps nothing grows with its depth, so that a few of its
    layers do, where those are not compared.
    """
    teacher = Teacher(found)
    device = home_of(found, beside)
    precision = choose(device, found.settings.tuning, found.settings.dtype)
    model = empty_model(found.base, found.settings, precision.weights)
    decoder: Any = model.get_decoder()
    if not whole and isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        decoder.layers = decoder.layers[:2]
    place(model, device)
    model.set_attn_implementation(layout.attention)
    teacher.model, teacher.layout = model.requires_grad_(requires_grad=False).eval(), layout
    return teacher


def home_of(found: Found, beside: torch.device) -> torch.device:
    """Say where a teacher will be."""
    return beside if found.device == "auto" else torch.device(found.device)


class _Contest:
    """`contest.Contest` without judge and without lots: as many answers, each as long as may be."""

    def __init__(self, prompted: Prompted, policy: Policy, settings: TrainingSettings) -> None:
        self._prompted, self._policy, self._longest = prompted, policy, settings.hybrid.max_new_tokens

    def draw(self, rows: Sequence[Example], _: int) -> list[Drawn]:
        """Give what comes of rows."""
        prompted = self._prompted
        questions = [parted(row)[0] for row in rows]
        with generating(prompted.model):
            plain = [prompted.embedded(asked, prompted.prompt(asked)) for asked in questions]
            features = last_states(prompted.model, plain)
            control = self._policy(features)[0]
            refined = [
                prompted.embedded(asked, self._policy.refine(prompted.prompt(asked), *drawn))
                for asked, *drawn in zip(questions, control, features, strict=True)
            ]
            answer(prompted.model, side_by_side([*plain, *refined]), self._longest, torch.float64)
        return [Drawn(*one, [0] * self._longest, False, True) for one in zip(control, features, strict=True)]


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Let a model be one that answers, and put it back, as `generate.generating` does."""
    before = model.config._attn_implementation  # noqa: SLF001, there is no public way to ask
    with torch.no_grad(), evaluating(model), torch.autocast(model.device.type, enabled=False):
        model.set_attn_implementation(without_flat(model))
        try:
            yield
        finally:
            model.set_attn_implementation(before)


def answer(model: Any, inputs: dict[str, torch.Tensor], longest: int, drawn_in: torch.dtype) -> None:
    """Do what takes most memory in generation: read all prompts, and make the last token behind a full cache."""
    rows = len(inputs["attention_mask"])
    found = model(**inputs, use_cache=True, logits_to_keep=1)
    torch.softmax(found.logits[:, -1].to(drawn_in), dim=-1).cumsum(-1)
    cache = found.past_key_values
    del found
    for layer in cache.layers:
        if layer.keys is None:
            continue  # of a model that was shortened
        keys, values = (
            of.new_empty(*of.shape[:-2], max(0, longest - 1), of.shape[-1]) for of in (layer.keys, layer.values)
        )
        layer.update(keys, values)
    mask = inputs["attention_mask"].new_ones(rows, inputs["attention_mask"].shape[1] + longest)
    model(input_ids=mask[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)


def longest_question(settings: TrainingSettings, tokenizer: Any, rows: Sequence[Example], lengths: list[int]) -> int:
    """Give how many tokens the longest prompt of recipe rft has, its examples among them."""
    places = sorted(range(len(lengths)), key=lambda place: -lengths[place])[:_LONGEST]
    texts = [text for shot in settings.rft.examples for text in (shot.question, shot.answer)]
    shown = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + _TURN for text in texts)
    return shown + max((len(parted(rows[place])[0]) for place in places), default=0)
