"""What lies in the inbox: data files, what goes with them, litter, what does not belong there. Looks at names alone."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from finetuned.home import data_extension, printable

_LITTER = re.compile(
    r"^[.#]|~$|\.(tmp|temp|part|partial|filepart|crdownload|download|swp|swx|lock)$|^(Thumbs\.db|@eaDir)$",
    re.IGNORECASE,
)
EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")
TABLES = {".csv": "", ".tsv": ", delimiter='\\t'"}  # endings, and what Python's csv must be told of them
OVERRIDE_SUFFIX = ".config.json"
HELD_OUT_SUFFIX = ".eval"  # of a stem: x.eval.jsonl is held out from the training on x.jsonl


@dataclass(frozen=True, slots=True)
class Found:
    """A data file in the inbox, with its held-out file. `profile` is the sub-folder it lies in, or empty."""

    path: Path
    profile: str
    held_out: Path | None = None

    @property
    def name(self) -> bytes:
        """Give the file's name as the bytes it is."""
        return os.fsencode(self.path.name)

    @property
    def override(self) -> Path:
        """Where the settings for this one file would be: `x.config.json` beside `x.jsonl`."""
        return self.path.with_name(_override_of(self.path.name))


@dataclass(frozen=True)
class Complaint:
    """A thing in the inbox that will not be trained as it is."""

    path: Path
    what: str
    remedy: str


def list_inbox(inbox: Path, profiles: Collection[str]) -> Iterator[Found | Complaint]:
    """List the inbox and the folders of the profiles, in the order of names."""
    yield from _list(inbox, profile="", profiles=profiles)
    try:
        names = sorted(entry.name for entry in os.scandir(inbox) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for profile in names:
        if profile in profiles:
            yield from _list(inbox / profile, profile=profile, profiles=profiles)


def _list(folder: Path, *, profile: str, profiles: Collection[str]) -> Iterator[Found | Complaint]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=attrgetter("name"))
    except OSError as error:
        yield Complaint(folder, f"cannot be listed: {error.strerror}", "Mend its permissions.")
        return
    pairs = _pairs([entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)])
    overrides = {entry.name for entry in entries if entry.name.endswith(OVERRIDE_SUFFIX)}
    if overrides:  # those that have a data file
        overrides &= {_override_of(entry.name) for entry in entries if is_data(entry.name)}
    for entry in entries:
        if _LITTER.search(printable(os.fsencode(entry.name))):
            continue
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            if profile or entry.name not in profiles:
                yield from _misplaced(path, profile, profiles)
        elif entry.name.endswith(OVERRIDE_SUFFIX):
            if entry.name not in overrides:
                yield Complaint(path, "waits for a data file of its name", "Drop that file too.")
        else:
            yield from _file(path, profile, pairs)


def _file(path: Path, profile: str, pairs: dict[str, _Pair]) -> Iterator[Found | Complaint]:
    if is_held_out(path.name):
        stem = held_out_stem(path.name)
        if not pairs[stem].data:
            yield Complaint(
                path,
                "is held-out data by its name and waits for its data file",
                f"Drop {_listed([stem])}.jsonl too, or rename this one if it is to be trained on.",
            )
    elif is_data(path.name):
        yield _with_held_out(path, profile, pairs.get(_stem(path.name)))
    else:
        yield Complaint(path, "is not a training file", remedy_for(path.name))


def _misplaced(folder: Path, profile: str, profiles: Collection[str]) -> Iterator[Complaint]:
    if profile:
        yield Complaint(folder, "is a folder in a profile's folder", "Move its files one up.")
        return
    try:
        if not any(folder.iterdir()):
            return
    except OSError:
        pass
    known = ", ".join(sorted(profiles)) or "none yet"
    yield Complaint(
        folder,
        f"is a folder, but config.json has no profile {folder.name!r}",
        f"Add it to `profiles` (there: {known}), or move its files into inbox/ itself.",
    )


@dataclass
class _Pair:
    """The held-out and the data files of one stem: one of each, as it should be."""

    held_out: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)


def _pairs(names: list[str]) -> dict[str, _Pair]:
    """Give the files of each stem that has a held-out file."""
    pairs: dict[str, _Pair] = {}
    for name in names:
        if is_held_out(name):
            pairs.setdefault(held_out_stem(name), _Pair()).held_out.append(name)
    for name in names if pairs else ():
        if is_data(name) and _stem(name) in pairs:
            pairs[_stem(name)].data.append(name)
    return pairs


def _with_held_out(path: Path, profile: str, pair: _Pair | None) -> Found | Complaint:
    if pair is None:
        return Found(path, profile)
    if len(pair.held_out) > 1:
        return Complaint(path, f"has several held-out files: {_listed(pair.held_out)}", "Leave one of them beside it.")
    if len(pair.data) > 1:
        return Complaint(
            path,
            f"is not the only one to which {_listed(pair.held_out)} may belong: {_listed(pair.data)}",
            "Rename all but one of these, or take them away until it is taken.",
        )
    return Found(path, profile, path.with_name(pair.held_out[0]))


def _listed(names: list[str]) -> str:
    return ", ".join(printable(os.fsencode(name)) for name in names)


def _stem(name: str) -> str:
    return name[: len(name) - len(data_extension(os.fsencode(name)))]


def _override_of(name: str) -> str:
    return _stem(name) + OVERRIDE_SUFFIX


def held_out_of(name: str, extension: str) -> str:
    """Give the name of a data file's held-out file with these extensions: `x.eval.json` of `x.jsonl`."""
    return f"{_stem(name)}{HELD_OUT_SUFFIX}{extension}"


def held_out_files(data: Path) -> list[Path]:
    """Give the files that lie beside a data file and would be taken with it as its held-out data."""
    with os.scandir(data.parent) as listing:
        names = sorted(entry.name for entry in listing if is_held_out(entry.name) and entry.is_file())
    return [data.with_name(name) for name in names if held_out_stem(name) == _stem(data.name)]


def relatives(name: str) -> list[str]:
    """Give the names of what would go with a data file, or be another to which that may belong."""
    stems = (_stem(name), _stem(name) + HELD_OUT_SUFFIX)
    return [_override_of(name), *(stem + extension for stem in stems for extension in EXTENSIONS)]


def held_out_stem(name: str) -> str:
    """Give the stem of the data file to which a held-out file of that name belongs: `x` of `x.eval.jsonl`."""
    return _stem(name)[: -len(HELD_OUT_SUFFIX)]


def is_held_out(name: str) -> bool:
    """Whether a file of that name would be taken with a data file, as its held-out data."""
    return HELD_OUT_SUFFIX in name.lower() and _is_taken(name) and _stem(name).lower().endswith(HELD_OUT_SUFFIX)


def remedy_for(name: str) -> str:
    """Say what to do with a file that is none of those which are taken."""
    taken = f"finetuned takes {', '.join(EXTENSIONS)}."
    suffix = Path(name).suffix
    if suffix.lower() not in TABLES:
        return taken
    source, target = (shlex.quote(printable(os.fsencode(one))) for one in (name, f"{Path(name).stem}.jsonl"))
    told = TABLES[suffix.lower()]
    program = f"import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin{told})]"
    return (
        f"{taken} With columns prompt and completion (or question and answer, or text): "
        f'python3 -c "{program}" < {source} > {target}'
    )


def is_data(name: str) -> bool:
    """Whether a file of that name would be taken by itself."""
    return _is_taken(name) and not is_held_out(name)


def _is_taken(name: str) -> bool:
    whole = not (name.endswith(OVERRIDE_SUFFIX) or _LITTER.search(printable(os.fsencode(name))))
    return whole and data_extension(os.fsencode(name)) in EXTENSIONS
