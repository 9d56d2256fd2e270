"""The way of a file into the training: read, checked, put into the model's words, tokenised, judged; in one pass and
constant memory, the index aside.

While the tokenizer's threads work on some rows, the next ones are read and rendered.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetuned.config import TrainingSettings
from finetuned.dataset import needs
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Fault, Report, rows_of
from finetuned.dataset.rows import Problem, Row
from finetuned.durable import NO_ROOM, sha256_of
from finetuned.trainer import store
from finetuned.trainer.chat import Rendered
from finetuned.trainer.quality import Quality
from finetuned.trainer.store import Examples
from finetuned.trainer.tokens import Encoded, Encoder, Refused, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS, _CHARACTERS = 256, 2**18  # tokenised at once
_AHEAD = 2  # times that many are on their way, so that the tokenizer's threads never wait
_GARBAGE = 100_000  # objects between two looks for cycles: rows have none, and looking took a tenth of the time
_BARS = 12  # of the histogram
_SHOWN = 1200  # tokens of the sample

_UnderWay = tuple[list[Row], list[Rendered | Problem | None], Future[list[Tokens]]]
Progress = Callable[[float, int], None]  # share of the file, and rows so far


class Door:
    """Reads files for one model with one set of settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings, *, cache: Path) -> None:
        self.tokenizer, self._settings, self._cache = tokenizer, settings, cache
        self._encoder = Encoder(tokenizer, max_length=settings.max_length)
        with suppress(AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)  # loading a tokenizer leaves as much behind as it keeps
        self.system_prompt = settings.system_prompt if self._encoder.renderer.takes_system() else None

    def read(
        self, path: Path, *, name: str, sha256: str | None = None, progress: Progress = lambda *_: None
    ) -> tuple[Examples, Report]:
        """Give a file's rows as tokens, from the cache where they are there, and the report.

        `name` is what the user calls the file. Raises DataError where the file as a whole cannot be read, OSError.
        """
        before = None if sha256 else _state(path)
        folder = self._cache / self._key(sha256 or sha256_of(path), path.suffix.lower())
        kept = store.load(folder, max_length=self._settings.max_length)
        if kept is not None:
            return kept
        try:
            return self._read(path, name, folder.name, progress, before)
        except OSError as error:
            if error.errno not in NO_ROOM or not self._cache.is_dir():
                raise
        store.prune(self._cache, kept_days=0)  # all of it can be made again
        return self._read(path, name, folder.name, progress, before)

    def _read(
        self, path: Path, name: str, key: str, progress: Progress, before: tuple[int, ...] | None
    ) -> tuple[Examples, Report]:
        with store.writable(self._cache) as cache:
            store.prune(cache)
            writer = store.Writer(cache / key)
            try:
                report = self._pass(path, name, writer, progress)
                same = before is None or before == _state(path)  # else it is not what was hashed
                return writer.finish(report, max_length=self._settings.max_length, publish=same)
            finally:
                writer.abandon()

    def _key(self, sha256: str, kind: str) -> str:
        tokenizer = self.tokenizer
        return store.cache_key(
            file=sha256,
            kind=kind,  # by which it is read
            template=tokenizer.chat_template,
            tokenizer=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            special=repr(sorted(tokenizer.special_tokens_map.items())),
            system_prompt=self.system_prompt,
            max_length=self._settings.max_length,
            needs=needs.of(self._settings),
            versions=[importlib.metadata.version(package) for package in ("transformers", "tokenizers", "jinja2")],
        )

    def _pass(self, path: Path, name: str, writer: store.Writer, progress: Progress) -> Report:
        report, quality = Report(), Quality(self._encoder.special_tokens)
        collected = _Collected(report, quality, writer)
        file = RowFile(path, name=name)
        rows = needs.suited(rows_of(file, report, system_prompt=self.system_prompt), self._settings, report)
        with ThreadPoolExecutor(1, "tokenizer") as beside, _few_collections():
            under_way: deque[_UnderWay] = deque()
            for part in _parts(rows):
                rendered = self._encoder.render(part)
                under_way.append((part, rendered, beside.submit(self._encoder.tokenise, rendered)))
                if len(under_way) > _AHEAD:
                    collected.take(self._encoded(*under_way.popleft()))
                progress(file.fraction, report.rows)
            while under_way:
                collected.take(self._encoded(*under_way.popleft()))
        collected.conclude()
        for code in needs.beside_the_point(self._settings):
            report.warnings.pop(code, None)
        report.tokens = _figures(writer.index(), collected.lost)
        if collected.sample is not None:
            report.sample = self._shown(collected.sample)
        return report

    def _encoded(
        self, rows: list[Row], rendered: list[Rendered | Problem | None], tokenised: Future[list[Tokens]]
    ) -> list[Encoded | Refused]:
        return list(self._encoder.encode(rows, rendered, tokenised.result()))

    def _shown(self, encoded: Encoded) -> dict[str, Any]:
        pairs = zip(encoded.ids[:_SHOWN].tolist(), encoded.supervised[:_SHOWN].tolist(), strict=True)
        pieces = [
            [self.tokenizer.decode([token for token, _ in run]), learned]
            for learned, run in groupby(pairs, key=lambda pair: pair[1])
        ]
        return {"line": encoded.row.line, "pieces": pieces}


class _Collected:
    """Gathers what comes out of the tokenizer."""

    def __init__(self, report: Report, quality: Quality, writer: store.Writer) -> None:
        self._report, self._quality, self._writer = report, quality, writer
        self.sample: Encoded | None = None
        self.lost = 0
        self._rows = 0
        self._goes_on = bytearray()  # for each written example, whether it is the rest of the long text before it

    def take(self, results: Sequence[Encoded | Refused]) -> None:
        """Count and write some rows."""
        report = self._report
        good: list[Encoded] = []
        for one in results:
            if isinstance(one, Refused):
                report.add(one.row.line, [one.problem])
                continue
            self._writer.add(one, one.row.hashes())
            if one.lost:
                self.lost += one.lost
                report.warn("rows_cut", one.row.line)
            self._goes_on.append(bool(good) and good[-1].row is one.row)
            if self._goes_on[-1]:
                continue
            good.append(one)
            self._quality.see(one.row, report)
            if one.short_answer:
                report.warn("single_token_answers", one.row.line)
        if good:
            self.sample = self.sample or good[0]
            own = [one.ids[one.begin :] for one in good]
            lengths = np.array([len(ids) for ids in own], np.int64)
            self._quality.near.see(np.concatenate(own), lengths, np.arange(self._rows, self._rows + len(own)))
            self._rows += len(own)

    def conclude(self) -> None:
        """Look at all rows together."""
        index = self._writer.index()
        once = np.frombuffer(self._goes_on, np.uint8) == 0  # by its line a row cannot be told in an array
        lines, identities = index[once, store.LINE], index[once, store.IDENTITY]
        self._quality.conclude(self._report, lines=lines, identities=identities)
        cut = self._report.warnings.get("rows_cut")
        if cut:
            cut.detail = f"{self.lost:,} tokens lost"


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let Python look for cycles seldom, and not among what was there before."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_GARBAGE, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Gather rows to be worked on at once: so many, or fewer that are long."""
    part: list[Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row.text) if row.text is not None else sum(len(turn.content) for turn in row.messages)
        if len(part) == _ROWS or size >= _CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _figures(index: NDArray[np.int64], lost: int) -> dict[str, Any]:
    """Give what will be trained: counts, percentiles of lengths in tokens, and a histogram of them."""
    lengths = index[:, store.LENGTH]
    if not len(lengths):
        return {}
    shortest, longest = int(lengths.min()), int(lengths.max())
    wide = -(-(longest - shortest + 1) // _BARS)  # whole tokens, as many in each bar
    bars = np.bincount((lengths - shortest) // wide).tolist()
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised": int(index[:, store.TARGETS].sum()),
        "lost": lost,
        "lengths": {f"p{share}": int(np.percentile(lengths, share)) for share in (5, 25, 50, 75, 95, 99)}
        | {"longest": longest},
        "histogram": [[min(shortest + (bar + 1) * wide - 1, longest), count] for bar, count in enumerate(bars)],
    }


def split(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Hold a share of the rows back, chosen by their content: equal rows fall on the same side, always."""
    shares = examples.column(store.IDENTITY).astype(np.uint64) / 2.0**64
    return examples.chosen(shares >= fraction), examples.chosen(shares < fraction)


def tell_overlap(train: Examples, held_out: Examples, report: Report) -> None:
    """Warn of held-out questions that the training file asks too."""
    rows = held_out.rows()
    both = rows[np.isin(rows[:, store.QUESTION], train.column(store.QUESTION))]
    if len(both):
        lines = both[:3, store.LINE].tolist()
        report.warnings["eval_overlap"] = Fault(len(both), lines, "lines of the held-out file", of=len(rows))


def rows_known_by(identities: Sequence[int], path: Path, *, name: str, system_prompt: str | None) -> list[Row]:
    """Read some rows once more. Their lines would not do: an array may be all on one."""
    wanted = set(identities)
    found: list[Row] = []
    if not wanted:
        return found
    for row in rows_of(RowFile(path, name=name), Report(), system_prompt=system_prompt):
        identity, _ = row.hashes()
        if identity in wanted:
            wanted.remove(identity)
            found.append(row)
        if not wanted:
            break
    return found


def _state(path: Path) -> tuple[int, ...]:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
