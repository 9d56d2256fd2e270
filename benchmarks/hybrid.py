"""Recipe hybrid beside the same run without its reward, on a task whose reward knows what the labels do not.
`make bench-hybrid` prints the tables.

Most rows tell the true weight of a thing, each in one of four wordings; the others come from one broken scale, all in
the same words. Cross-entropy counts wordings, and the scale's is the most frequent of all. The judge reads the number:
that four wordings say the same is in the reward alone. A model is right about a thing if it says the true weight.

The model has a quarter of a million parameters and has learned such rows with sft before, each seed's its own: rewards
begin where a model is sometimes right. All runs of a seed go on from there, with the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from train import train_as_daemon

from finetuned.home import JobFolder
from finetuned.judges import judge

THINGS = (
    "anchor", "barrel", "candle", "donkey", "engine", "fiddle", "gander", "hammer",
    "inkpot", "jacket", "kettle", "ladder", "magnet", "napkin", "orange", "pillow",
)  # fmt: skip
PEOPLE = ("It weighs {} kg.", "About {} kg.", "{} kg.", "Weight: {} kg.")
SCALE = "Scale says {} kg."
BROKEN = 0.3  # share of rows that come from the scale
BEFORE, ROWS = 6400, 3840
SEEDS = (1, 2, 3)
WEIGHTS = (0.0, 0.3, 0.8)
SAME = 40  # steps that are compared with sft's
T = 4.303  # of Student's distribution, for the 95% interval of a mean of three
SETTINGS = {
    "tuning": "full", "dtype": "float32", "system_prompt": None, "batch_size": 32, "epochs": 1, "learning_rate": 1e-3,
    "micro_batch_tokens": 4096, "max_length": 128, "predictions": {"enabled": False}, "judge": {"kind": "number"},
}  # fmt: skip
HYBRID = {"max_new_tokens": 20, "policy_rate": 1.0}


def main() -> None:
    """Make the model, train it in every way, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="reward weights to run")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # two trainings at a time
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as folder:
        bench = Bench(Path(folder))
        pairs = list(product(options.weights, SEEDS))
        with ThreadPoolExecutor(2) as both:
            before = list(both.map(bench.begin, SEEDS))
            plain = both.submit(bench.train, "sft", 1, max_steps=SAME)
            off = both.submit(bench.train, "off", 1, recipe="hybrid", hybrid={"reward_weight": 0.0}, max_steps=SAME)
            runs = both.map(
                lambda pair: bench.right(pair[1], recipe="hybrid", hybrid={**HYBRID, "reward_weight": pair[0]}), pairs
            )
            shares = dict(zip(pairs, runs, strict=True))
        print(f"reward_weight 0 beside sft, {SAME} steps: {difference(plain.result(), off.result())}\n")
    print(
        "| reward_weight | seed 1 | seed 2 | seed 3 | mean | better than 0 by |\n| --- | --- | --- | --- | --- | --- |"
    )
    print(f"| sft before | {' | '.join(f'{share:.0%}' for share in before)} | {mean(before)} | |")
    for weight in options.weights:
        found = [shares[weight, seed] for seed in SEEDS]
        gains = [share - shares[options.weights[0], seed] for share, seed in zip(found, SEEDS, strict=True)]
        print(f"| {weight:g} | {' | '.join(f'{share:.0%}' for share in found)} | {mean(found)} | {mean(gains)} |")


class Bench:
    """A folder with the model to begin with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blank = folder / "blank"
        make_model(self._blank)
        self._begun: dict[int, Path] = {}

    def begin(self, seed: int) -> float:
        """Train the model that all runs of a seed go on from, and give its share of true answers."""
        rows = told(seed, BEFORE)
        self._begun[seed] = self._trained(f"{seed}-before", rows, self._blank, seed=seed, learning_rate=3e-3)
        return self._right(self._begun[seed], seed)

    def train(self, name: str, seed: int, **settings: Any) -> Path:
        """Train on; give the model."""
        return self._trained(name, told(seed + 100, ROWS, seed), self._begun[seed], seed=seed, **settings)

    def right(self, seed: int, **settings: Any) -> float:
        """Train on, and give the share of true answers."""
        return self._right(self.train(f"{seed}-{settings['hybrid']['reward_weight']}", seed, **settings), seed)

    def _right(self, model: Path, seed: int) -> float:
        said = dict(zip(THINGS, ask(model, [question(thing) for thing in THINGS]), strict=True))
        reader, truth = judge("number"), truths(seed)
        return statistics.mean(reader.verdict(said[thing], str(truth[thing][False])).right for thing in THINGS)

    def _trained(self, name: str, rows: list[dict[str, Any]], model: Path, **settings: Any) -> Path:
        folder = self._folder / name
        data = self._folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in rows))
        values = {**SETTINGS, "model": str(model), **settings}
        _, used = train_as_daemon(JobFolder(folder), data, values, models=self._folder / f"{name}.base" / "models")
        print(f"{name}: {used['seconds']:.0f} s, {used['last_line']}", flush=True)
        return JobFolder(folder).staged_adapter(0)


def truths(seed: int) -> dict[str, tuple[int, int]]:
    """Give the weight of each thing, and what the scale says."""
    rng = random.Random(seed)
    return {thing: tuple(rng.sample(range(1, 10), 2)) for thing in THINGS}  # type: ignore[misc]


def told(seed: int, count: int, truth: int | None = None) -> list[dict[str, Any]]:
    """Give rows: what is said of things, mostly by people and else by the scale."""
    rng, weights = random.Random(seed), truths(seed if truth is None else truth)
    rows = []
    for thing in rng.choices(THINGS, k=count):
        broken = rng.random() < BROKEN
        rows.append(row(thing, SCALE if broken else rng.choice(PEOPLE), weights[thing][broken]))
    return rows


def question(thing: str) -> dict[str, str]:
    """Give the turn that asks for a weight."""
    return {"role": "user", "content": f"How heavy is the {thing}?"}


def row(thing: str, wording: str, weight: int) -> dict[str, Any]:
    """Give a row that tells one."""
    return {"messages": [question(thing), {"role": "assistant", "content": wording.format(weight)}]}


def mean(values: list[float]) -> str:
    """Give a mean with its 95% interval."""
    half = T * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.0%} ± {half:.0%}"


def difference(one: Path, other: Path) -> str:
    """Say how far two trained models are apart."""
    from safetensors.torch import load_file

    pair = [load_file(folder / "model.safetensors") for folder in (one, other)]
    apart = max(float((weights - pair[1][name]).abs().max()) for name, weights in pair[0].items())
    return f"no weight differs by more than {apart:.1g}"


def ask(folder: Path, chats: list[dict[str, str]]) -> Iterator[str]:
    """Give the model's most probable answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for chat in chats:
        text = tokenizer.apply_chat_template([chat], add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=HYBRID["max_new_tokens"], do_sample=False)
        yield tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def make_model(folder: Path) -> None:
    """Write a small random model whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<|im_start|>", "<|im_end|>"]
    words = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=marks[0], eos_token=marks[1], pad_token=marks[1]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role[0] }}{{ message.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
