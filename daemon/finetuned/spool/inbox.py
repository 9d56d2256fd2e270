"""What lies in the inbox: data files, overrides, litter, what does not belong there. Looks at names, not into files."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from finetuned.home import data_extension, printable

_LITTER = re.compile(
    r"^[.#]|~$|\.(tmp|temp|part|partial|filepart|crdownload|download|swp|swx|lock)$|^(Thumbs\.db|@eaDir)$",
    re.IGNORECASE,
)
EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")
OVERRIDE_SUFFIX = ".config.json"


@dataclass(frozen=True, slots=True)
class Found:
    """A data file in the inbox. `profile` is the sub-folder it lies in, or empty."""

    path: Path
    profile: str

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
        elif is_data(entry.name):
            yield Found(path, profile)
        else:
            yield Complaint(path, "is not a training file", f"finetuned takes {', '.join(EXTENSIONS)}.")


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


def _override_of(name: str) -> str:
    return name[: len(name) - len(data_extension(os.fsencode(name)))] + OVERRIDE_SUFFIX


def is_data(name: str) -> bool:
    """Whether a file of that name would be taken."""
    whole = not (name.endswith(OVERRIDE_SUFFIX) or _LITTER.search(printable(os.fsencode(name))))
    return whole and data_extension(os.fsencode(name)) in EXTENSIONS
