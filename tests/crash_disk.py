"""A disk in memory: what a daemon has done to it, and every state in which a power loss may leave it.

The rules are weaker than any journaling file system's, so that the order of steps has to do all the work:

- a name that is made, replaced or removed is sure only once its folder is fsynced; until then any subset of such
  changes may be kept;
- a file moved between folders may be in both after a power loss, and in none if the folder it left is fsynced first;
  a folder is in one of them;
- a file's content is sure once the file is fsynced; until then it may be what was sure before, half, or all of it.

After kill -9 everything is there, but a later power loss may still take back what was not fsynced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

ROOT = 0
MOST_CHANGES = 10  # whose subsets are all looked at

Tree = dict[str, bytes | None]  # path in the base directory: content of a file, None for a folder


@dataclass(frozen=True)
class Node:
    """A file or folder, whatever names lead to it. `sure` is the content that no power loss takes back."""

    content: bytes | None
    sure: bytes | None
    mtime_ns: int = 10**18


@dataclass(frozen=True)
class Change:
    """A name that now leads to `node`, or to nothing. `after`: kept only together with that other change."""

    number: int
    folder: int
    name: str
    node: int | None
    after: int | None = None
    whole: bool = False  # of a folder's move: that other change is not kept without this one either


@dataclass
class Disk:
    """Folders and files: as they are seen, as they are sure to be, and the changes between the two, in order."""

    nodes: dict[int, Node] = field(default_factory=lambda: {ROOT: Node(None, None)})
    seen: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    sure: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    changes: list[Change] = field(default_factory=list)
    count: int = 0

    def copy(self) -> Disk:
        """Give a disk that goes its own way."""
        return Disk(
            dict(self.nodes),
            {folder: dict(names) for folder, names in self.seen.items()},
            {folder: dict(names) for folder, names in self.sure.items()},
            list(self.changes),
            self.count,
        )

    # -- what a process does

    def find(self, path: str) -> int | None:
        """Give the node at a path, or None."""
        node: int | None = ROOT
        for name in path.split("/") if path else ():
            node = self.seen.get(node, {}).get(name) if node is not None else None
        return node

    def make(self, path: str, content: bytes | None) -> None:
        """Make a folder (content None) or a file."""
        folder, name = self._place(path)
        self.count += 1
        node = self.count
        self.nodes[node] = Node(content, None if content is None else b"")
        if content is None:
            self.seen[node], self.sure[node] = {}, {}
        self._change(folder, name, node)

    def link(self, source: str, target: str) -> None:
        """Give a file another name."""
        self._change(*self._place(target), self.find(source))

    def write(self, node: int, content: bytes) -> None:
        """Change a file's content."""
        self.nodes[node] = replace(self.nodes[node], content=content)

    def touch(self, node: int, mtime_ns: int) -> None:
        """Change a file's time."""
        self.nodes[node] = replace(self.nodes[node], mtime_ns=mtime_ns)

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder."""
        node = self.find(source)
        assert node is not None
        if node == self.find(target):  # two names of one file: nothing happens, as rename(2) has it
            return
        arrives = self._change(*self._place(target), node)
        self._change(*self._place(source), None, after=arrives, whole=self.nodes[node].content is None)

    def remove(self, path: str) -> None:
        """Remove a name."""
        self._change(*self._place(path), None)

    def sync(self, node: int) -> None:
        """Make a file's content or a folder's names sure."""
        if self.nodes[node].content is not None:
            self.nodes[node] = replace(self.nodes[node], sure=self.nodes[node].content)
            return
        now = {change.number for change in self.changes if change.folder == node}
        self._make_sure(now | {change.number for change in self.changes if change.whole and change.after in now})

    def make_sure(self, path: str) -> None:
        """Make one name sure."""
        place = self._place(path)
        self._make_sure({change.number for change in self.changes if (change.folder, change.name) == place})

    def _make_sure(self, now: set[int]) -> None:
        for change in [change for change in self.changes if change.number in now]:
            _apply(self.sure, change)
            self.changes = [
                other
                for other in self.changes
                if other.number > change.number or (other.folder, other.name) != (change.folder, change.name)
            ]
        self.changes = [change for change in self.changes if change.number not in now]

    def settle(self) -> Disk:
        """Make everything sure."""
        self.sure = {folder: dict(names) for folder, names in self.seen.items()}
        self.nodes = {number: replace(node, sure=node.content) for number, node in self.nodes.items()}
        self.changes = []
        return self

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        found = self.find(folder)
        assert found is not None, f"no folder {folder}"
        return found, name

    def _change(
        self, folder: int, name: str, node: int | None, *, after: int | None = None, whole: bool = False
    ) -> int:
        self.count += 1
        change = Change(self.count, folder, name, node, after, whole)
        _apply(self.seen, change)
        self.changes.append(change)
        return change.number

    # -- what is left of it

    def power_losses(self) -> Iterator[tuple[str, Disk]]:
        """Give every disk that a power loss may leave, with what it took back. Equal ones may come twice."""
        for kept in self._kept():
            names = {folder: dict(entries) for folder, entries in self.sure.items()}
            for change in kept:
                _apply(names, change)
            there = _reachable(names)
            unsure = [node for node in sorted(there) if self.nodes[node].content != self.nodes[node].sure]
            lost = ", ".join(_described(change) for change in self.changes if change not in kept)
            for contents in product(*(self._contents(node) for node in unsure)):
                nodes = {node: self.nodes[node] for node in there}
                for node, content in zip(unsure, contents, strict=True):
                    nodes[node] = replace(nodes[node], content=content, sure=content)
                folders = {folder: entries for folder, entries in names.items() if folder in there}
                torn = [f"{len(content)} bytes of file {node}" for node, content in zip(unsure, contents, strict=True)]
                sure = {folder: dict(entries) for folder, entries in folders.items()}
                yield f"without [{lost}] {', '.join(torn)}", Disk(nodes, folders, sure, [], self.count)

    def _contents(self, node: int) -> list[bytes]:
        sure, content = self.nodes[node].sure or b"", self.nodes[node].content or b""
        return list(dict.fromkeys([sure, content[: len(content) // 2], content]))

    def _kept(self) -> Iterator[list[Change]]:
        total = len(self.changes)
        if total <= MOST_CHANGES:
            choices: Iterator[int] = iter(range(2**total))
        else:  # in order up to one of them; all but one; one alone
            everything = 2**total - 1
            singles = [2**n for n in range(total)]
            choices = iter(
                {*(one - 1 for one in singles), *(everything - one for one in singles), *singles, everything}
            )
        for choice in choices:
            kept = [change for n, change in enumerate(self.changes) if choice >> n & 1]
            if self._possible({change.number for change in kept}):
                yield kept

    def _possible(self, kept: set[int]) -> bool:
        open_ones = {change.number for change in self.changes}
        for change in self.changes:
            if change.after in open_ones:
                if change.number in kept and change.after not in kept:
                    return False
                if change.whole and change.after in kept and change.number not in kept:
                    return False
        return True

    # -- looking at it

    def tree(self) -> Tree:
        """Give every path with its content."""
        return {path: self.nodes[node].content for path, node in self.paths()}

    def paths(self) -> Iterator[tuple[str, int]]:
        """Give every path with its node, a folder before what is in it."""
        waiting = [("", ROOT)]
        while waiting:
            prefix, folder = waiting.pop()
            for name, node in self.seen[folder].items():
                yield prefix + name, node
                if node in self.seen:
                    waiting.append((f"{prefix}{name}/", node))

    def key(self) -> object:
        """Give a value that is equal for disks with the same future, whatever numbers their nodes have."""
        names: dict[int, str] = {ROOT: ""}
        tree = []
        for path, node in self.paths():
            other = names.setdefault(node, path)
            here = self.nodes[node]
            inbox = (node, here.mtime_ns) if path.startswith("inbox/") else None  # which tell one from another
            tree.append((path, here.content, here.content == here.sure or here.sure, other != path and other, inbox))
        changes = []
        numbers: dict[int, int] = {}
        for change in self.changes:
            numbers[change.number] = len(numbers)
            place, node = (
                names.setdefault(n, f"?{len(names)}") if n is not None else None for n in (change.folder, change.node)
            )
            changes.append((place, change.name, node, numbers.get(change.after or -1), change.whole))
        sure = [
            (names.get(folder), name, names.get(node), self.nodes[node].sure)
            for folder, entries in (self.sure.items() if changes else ())
            for name, node in entries.items()
        ]
        return (frozenset(tree), tuple(changes), frozenset(sure))


def _apply(names: dict[int, dict[str, int]], change: Change) -> None:
    if change.node is None:
        names[change.folder].pop(change.name, None)
    else:
        names[change.folder][change.name] = change.node


def _reachable(names: dict[int, dict[str, int]]) -> set[int]:
    found, waiting = {ROOT}, [ROOT]
    while waiting:
        for node in names.get(waiting.pop(), {}).values():
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _described(change: Change) -> str:
    return f"{'-' if change.node is None else '+'}{change.name}"
