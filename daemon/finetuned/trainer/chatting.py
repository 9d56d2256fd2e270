"""`python -m finetuned.trainer.chatting ADAPTER`: a chat with what was trained, in its own template and with its own
system prompt. `finetuned chat` becomes this process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from transformers import AutoTokenizer, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from finetuned.adapters import CONFIG, read_adapter, read_story
from finetuned.dataset.rows import Message
from finetuned.errors import FinetunedError, ModelError, harmless
from finetuned.events import ExitCode
from finetuned.trainer import memory
from finetuned.trainer.base import find_base, quiet_libraries
from finetuned.trainer.chat import Renderer
from finetuned.trainer.columns import LEAST, side_by_side
from finetuned.trainer.generate import turn_ends
from finetuned.trainer.merge import base_settings
from finetuned.trainer.model import load_model
from finetuned.trainer.precision import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANEW = "/new"


def main(arguments: list[str]) -> int:
    """Load and talk until there are no more questions; the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--model")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        voices = load(options.adapter, compare=options.compare, model=options.model, models=options.models)
        for voice in voices:
            voice.longest, voice.temperature = options.longest, options.temperature
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # whatever a pipe holds is a question
        _talk(voices)
    except FinetunedError as error:
        click.echo(f"finetuned: {error}", err=True)
        return ExitCode.BAD_SETTINGS
    except KeyboardInterrupt:
        return ExitCode.STOPPED
    except BrokenPipeError:  # who read the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
    except (RuntimeError, MemoryError) as error:
        detail = memory.out_of_memory(error)
        if detail is None:
            raise
        click.echo(
            f"finetuned: the model does not fit into memory: {detail}. Free some, or take a smaller one.", err=True
        )
        return ExitCode.OUT_OF_MEMORY
    return 0


def load(adapter: Path, *, compare: bool, model: str | None, models: Path) -> list[Voice]:
    """Give who answers: the trained model, and before it the base where they are compared. Raises FinetunedError."""
    story = read_story(adapter)
    trained = story.get("settings", {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuning = story.get("rung", {}).get("tuning")
    if tuning not in {"qlora", "lora-8bit"} or device.type == "cpu":  # there dense weights are as small as need be
        tuning = "lora"
    precision = choose(device, tuning, trained.get("dtype", "auto"))

    def loaded(name: str | None, base: str) -> PreTrainedModel:
        settings = base_settings(base, story if name is None else {}, model=name)
        found = find_base(settings, models=models, base_dir=Path.cwd())
        whole = load_model(found, settings, tuning=tuning, precision=precision, device=device)
        whole.config.use_cache = True
        return whole.eval()

    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"there is no tokenizer that can be read: {str(error).strip().splitlines()[0]}",
            where=str(adapter),
            remedy="Put that of its base model there: tokenizer.json and tokenizer_config.json.",
        ) from error
    shared: dict[str, Any] = {"tokenizer": tokenizer, "system": trained.get("system_prompt")}
    if not (adapter / CONFIG).is_file():  # a full fine-tune
        voices = [Voice(adapter.name, loaded(str(adapter), ""), **shared)]
        if compare:
            voices.insert(0, Voice("base", loaded(model, str(trained.get("model", ""))), **shared))
        return voices
    if tuning == "lora":
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # a second, and talk of its own
    from peft import PeftModel

    config = read_adapter(adapter, where=str(adapter), soft_prompts=True)
    try:
        both = PeftModel.from_pretrained(loaded(model, config["base_model_name_or_path"]), adapter).eval()
    except RuntimeError as error:
        raise ModelError(
            f"the adapter does not fit its base: {str(error).strip().splitlines()[0]}",
            where=str(adapter),
            remedy="Name its base with --model.",
        ) from error
    voices = [Voice(adapter.name, both, **shared)]
    return [Voice("base", both, **shared, plain=True), *voices] if compare else voices


@dataclass
class Voice:
    """A model that answers, and what was said so far."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None
    plain: bool = False  # without its adapter
    longest: int = 512  # tokens of an answer
    temperature: float = 0.0
    said: list[Message] = field(default_factory=list)

    def begin_anew(self) -> None:
        """Forget what was said."""
        self.said.clear()

    @torch.no_grad()
    def answer(self, question: str, interrupts: Interrupts, *, shown: bool = True) -> str:
        """Give the answer, and write it to standard output as it comes if it is to be `shown`.

        Raises what the template or the memory refuses.
        """
        self.said.append(Message("user", question))
        try:
            inputs = self._inputs()
            streamer = _Streamer(self.tokenizer, shown=shown)
            drawn = self.temperature > 0
            without = self.model.disable_adapter() if self.plain else nullcontext()
            with without, interrupts.heard():
                self.model.generate(
                    **inputs,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([interrupts.stop]),
                    max_new_tokens=self.longest,
                    do_sample=drawn,
                    temperature=self.temperature if drawn else None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                    eos_token_id=sorted(turn_ends(self.model, self.tokenizer)),
                )
        except BaseException:
            self.said.pop()
            raise
        self.said.append(Message("assistant", streamer.text.strip()))
        return streamer.text.strip()

    def _inputs(self) -> Any:
        """Give the chat as tokens; where it is too long for the model the oldest questions are forgotten."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            encoded = self.tokenizer(self._text(), return_tensors="pt", add_special_tokens=False)
            length = encoded["input_ids"].shape[1]
            if positions is None or len(self.said) < 3 or length + self.longest <= positions:
                device = next(self.model.parameters()).device
                return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
            del self.said[:2]

    def _text(self) -> str:
        if not self.tokenizer.chat_template:  # a base model that learned texts goes on with one
            return self.said[-1].content
        system = [Message("system", self.system)] if self.system else []
        return Renderer(self.tokenizer).render([*system, *self.said], add_generation_prompt=True)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Writes an answer as it comes, whole characters only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, shown: bool) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._prompt_is_next = True
        self._tokens: list[int] = []
        self.text = ""  # of them, as far as it is shown

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._tokens += value.flatten().tolist()
        text = self._decoded()
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Write what is left."""
        self._show(self._decoded())
        if self._shown:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _decoded(self) -> str:
        """Decode all of it: some tokenizers drop the space that what they decode begins with."""
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _show(self, text: str) -> None:
        new = text[len(self.text) :]
        self.text += new
        if self._shown:
            sys.stdout.write(_writable(new))
            sys.stdout.flush()


def _writable(text: str) -> str:
    letters = sys.stdout.encoding
    return harmless(text).encode(letters, "replace").decode(letters)


class Interrupts:
    """Ctrl-C: in an answer it ends that, elsewhere it raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._answering = self._asked = False
        signal.signal(signal.SIGINT, self._hear)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Let Ctrl-C end an answer for a while."""
        self._answering, self._asked = True, False
        try:
            yield
        finally:
            self._answering = False

    def stop(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Say for each row whether its answer ends here, as transformers asks after each token."""
        return torch.full((len(input_ids),), self._asked, dtype=torch.bool, device=input_ids.device)

    def _hear(self, *_: object) -> None:
        if not self._answering or self._asked:  # a second time: it hangs
            raise KeyboardInterrupt
        self._asked = True


def _talk(voices: list[Voice]) -> None:
    """Answer what is asked until there is nothing more. From a pipe each line is a question of its own."""
    interrupts = Interrupts()
    live = sys.stdin.isatty()
    if live:
        with suppress(ImportError):
            import readline  # noqa: F401, input() then knows arrows and earlier lines
        told = f"Ctrl-C ends an answer, {_ANEW} begins a new chat, Ctrl-D ends it."
        click.echo(f"{' and '.join(voice.name for voice in voices)}. {told}", err=True)
    for question in _questions() if live else map(str.strip, sys.stdin):
        if not question:
            continue
        if not live or question == _ANEW:
            for voice in voices:
                voice.begin_anew()
            if live:
                continue
            click.echo(f"> {harmless(question)}")
        width = shutil.get_terminal_size().columns
        if len(voices) > 1 and sys.stdout.isatty() and width >= LEAST:
            texts = [f"[{voice.name}]\n{_answer(voice, question, interrupts, shown=False)}" for voice in voices]
            click.echo("\n".join(side_by_side([_writable(text) for text in texts], width)))
        else:
            for voice in voices:
                if len(voices) > 1:
                    click.secho(f"[{voice.name}]", bold=True)
                _answer(voice, question, interrupts)
        click.echo()


def _answer(voice: Voice, question: str, interrupts: Interrupts, *, shown: bool = True) -> str:
    """Answer, or say why not. Raises BrokenPipeError."""
    try:
        return voice.answer(question, interrupts, shown=shown)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001, templates raise anything; the next question may do
        full = memory.out_of_memory(error) if isinstance(error, RuntimeError | MemoryError) else None
        click.echo(f"no answer: {harmless(full or str(error) or type(error).__name__)}", err=True)
        memory.give_back()
        return ""


def _questions() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\nCtrl-D ends the chat.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
