"""Proof that the crash model can fail: the real code with an fsync dropped or two steps swapped must break it.

`make mutants` tries each in a copy of the package and prints what catches it; exit 1 if one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "daemon" / "finetuned"
DURABLE, LEDGER, SERVICE = "durable.py", "ledger.py", "service.py"
CLAIM, PUBLISH, RECOVER, ORDERS = "spool/claim.py", "spool/publish.py", "spool/recover.py", "spool/orders.py"
REBUILD = "spool/rebuild.py"


@dataclass(frozen=True)
class Mutant:
    """In the function of `file` that begins with `place`, each text is replaced by another."""

    name: str
    file: str
    place: str
    edits: dict[str, str]

    def apply(self, package: Path) -> None:
        """Change a copy of the package. Raises ValueError if the code is no longer what the list says."""
        path = package / self.file
        code = path.read_text()
        begin = code.index(self.place)
        end = min(
            (at for at in (code.find(f"\n{more}", begin + 1) for more in ("def ", "    def ")) if at > 0), default=None
        )
        part = code[begin:end]
        for old, new in self.edits.items():
            if part.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} is {part.count(old)} times in {self.place} of {self.file}")
            part = part.replace(old, new)
        path.write_text(code[:begin] + part + (code[end:] if end else ""))


def without(name: str, file: str, place: str, line: str) -> Mutant:
    """Drop one line, or one member of a list."""
    return Mutant(name, file, place, {line: "" if line.startswith(", ") or line.endswith(", ") else "pass"})


_D1, _D2, _D3 = (
    "ledger.add(job)  # D1",
    "write_spec(home, job, beside)  # D2",
    "_take(found.path, input_path(home, job))  # D3",
)
_BESIDE = "take_beside(ledger, home, job, found.path.parent, beside)"
_D9 = "move(staged, target)  # D9: this is publication"
_PUT_AWAY = "_put_away(home, job, folder)"
_FINISH, _FAIL = (
    "ledger.update(job.id, state=State.FINISHED, outcome=",
    "ledger.update(job.id, state=State.FAILING, reason=",
)
_FILES = "*((source / name, place) for place, name in reversed(users_files(home, job))),"
_OVERRIDES = "folder.overrides),"
_R1, _R2 = "job = ledger.update(  # R1", "write_spec(home, job)  # R2"

MUTANTS = [
    without("write_file: content not fsynced", DURABLE, "def write_file", "os.fsync(file.fileno())"),
    without("write_file: folder not fsynced", DURABLE, "def write_file", "sync_folder(path.parent)"),
    without("move: target not fsynced", DURABLE, "def move", "sync_folder(target.parent)"),
    without("move: source not fsynced", DURABLE, "def move", "sync_folder(source.parent)"),
    Mutant(
        "move: source fsynced first",
        DURABLE,
        "def move",
        {"    sync_folder(target.parent)": "    sync_folder(source.parent); sync_folder(target.parent)"},
    ),
    Mutant("move: both names stay", DURABLE, "def move", {"if same_file(source, target)": "if False"}),
    without("make_folder: parent not fsynced", DURABLE, "def make_folder", "sync_folder(path.parent)"),
    without("sync_tree: files not fsynced", DURABLE, "def sync_tree", "sync_file(Path(folder, name))"),
    without("sync_tree: folders not fsynced", DURABLE, "def sync_tree", "sync_folder(Path(folder))"),
    Mutant("synchronous=NORMAL", LEDGER, "def open(", {"synchronous=FULL": "synchronous=NORMAL"}),
    Mutant(
        "D1 and D2 after D3",
        CLAIM,
        "def claim",
        {
            _D1: "make_folder(home.job(job.id).path)",
            _D2: "pass",
            _D3: f"{_D3.partition('  #')[0]}; write_spec(home, job, beside); ledger.add(job)",
        },
    ),
    Mutant(
        "D2 after D3",
        CLAIM,
        "def claim",
        {
            _D2: "make_folder(home.job(job.id).path)",
            _D3: f"{_D3.partition('  #')[0]}; write_spec(home, job, beside)",
        },
    ),
    Mutant(
        "what is beside the data taken before D3",
        CLAIM,
        "def claim",
        {_D2: f"{_D2.partition('  #')[0]}; {_BESIDE}"},
    ),
    Mutant("D3: a copied held-out file stays", CLAIM, "def _take_once", {"source.unlink()": "pass"}),
    Mutant(
        "held-out file put away after the input",
        PUBLISH,
        "def _put_away",
        {"users_files(home, job)": "reversed(users_files(home, job))"},
    ),
    without("D3: copy not fsynced", CLAIM, "def _take", "sync_file(partial)"),
    without("D3: inbox not fsynced after a copy", CLAIM, "def _take", "sync_folder(source.parent)"),
    Mutant(
        "D3: link removed before the copy has its name",
        CLAIM,
        "def _take",
        {"sync_file(partial)": "sync_file(partial); source.unlink()", "\n    source.unlink()": ""},
    ),
    without("D4: input not fsynced", CLAIM, "def fingerprint", "os.fsync(file.fileno())  # uploaders do not"),
    without("D4: held-out file not fsynced", CLAIM, "def files_to_hash", ", *([held_out] if held_out else [])"),
    without("claim undone: jobs/ not fsynced", CLAIM, "def forget", "sync_folder(home.jobs)"),
    Mutant("claim undone: row first", CLAIM, "def forget", {"    sync_folder(home.jobs)": "    ledger.drop(job.id)"}),
    without("D8: adapter not fsynced", PUBLISH, "def publish(", "sync_tree(staged)"),
    Mutant(
        "D9 before D8",
        PUBLISH,
        "def publish(",
        {"sync_tree(staged)": "pass", _D9: "move(staged, target); sync_tree(target)"},
    ),
    Mutant(
        "D10 before D9",
        PUBLISH,
        "def publish(",
        {_D9: "job = ledger.update(job.id, state=State.TRAINED); move(staged, target)"},
    ),
    Mutant(
        "name not committed before D9",
        PUBLISH,
        "def publish(",
        {
            "job = choose_name(ledger, home, job)": "target = home.adapters / safe_name(job.name)",
            "target = home.adapters / str(job.adapter)": "",
            "ledger.update(job.id, state": "ledger.update(job.id, adapter=target.name, state",
        },
    ),
    Mutant("D12 before D11", PUBLISH, "def archive(", {_PUT_AWAY: f"{_FINISH}Outcome.SUCCEEDED); {_PUT_AWAY}"}),
    Mutant(
        "failure: put away before it is committed",
        PUBLISH,
        "def fail(",
        {
            "if job.state is not State.FAILING": "vars(job)['reason'] = reason or job.reason\n    if False",
            _PUT_AWAY: f"{_PUT_AWAY}; job = {_FAIL}job.reason)",
        },
    ),
    Mutant("failure: finished before put away", PUBLISH, "def fail(", {_PUT_AWAY: f"{_FINISH}outcome); {_PUT_AWAY}"}),
    without("pause undone: not fsynced", ORDERS, "def resume", "sync_folder(home.machinery)"),
    Mutant("R3 before R1", ORDERS, "def retry", {_R1: "take_back(home, job); job = ledger.update("}),
    Mutant(
        "R3 before R2",
        ORDERS,
        "def take_back",
        {_R2: "folder.path.mkdir(exist_ok=True)", "(source / REASON)": "write_spec(home, job); (source / REASON)"},
    ),
    Mutant("R3: input last", ORDERS, "def take_back", {_FILES: "", _OVERRIDES: f"{_OVERRIDES} {_FILES}"}),
    Mutant("R3: held-out file before the input", ORDERS, "def take_back", {"reversed(users_files": "list(users_files"}),
    Mutant(
        "order forgotten before it is carried out",
        SERVICE,
        "def _obey",
        {"self._ledger.orders():": "self._ledger.orders():\n            self._ledger.drop_order(number)"},
    ),
    without("recovery: nothing fsynced", RECOVER, "def _make_durable", "sync_folder(folder)"),
    Mutant(
        "recovery: source fsynced first", RECOVER, "def _make_durable", {"is State.CLAIMING": "is not State.CLAIMING"}
    ),
    without("recovery: jobs/ not fsynced", RECOVER, "def _make_durable", "home.jobs, "),
    Mutant("recovery: job's folder not fsynced", RECOVER, "def _make_durable", {", home.job(job.id).path]": "]"}),
    without("recovery: adapters/ not fsynced", RECOVER, "def _make_durable", "home.adapters, "),
    without("recovery: archive/ not fsynced", RECOVER, "def _make_durable", "home.archive, "),
    without("recovery: archive/YYYY-MM/ not fsynced", RECOVER, "def _make_durable", "put_away.parent, "),
    without("recovery: archive/YYYY-MM/ID/ not fsynced", RECOVER, "def _make_durable", "put_away, "),
    without("recovery: archive/failed/ not fsynced", RECOVER, "def _make_durable", "home.failed, "),
    Mutant("recovery: archive/failed/ID/ not fsynced", RECOVER, "def _make_durable", {", home.failed / job.id]": "]"}),
    Mutant("recovery: inbox not fsynced", RECOVER, "def _make_durable", {", home.inbox / job.profile]": "]"}),
    Mutant(
        "recovery: two names of one file", RECOVER, "def _recover_claim", {"or same_file(": "or False and same_file("}
    ),
    without(
        "recovery: held-out file left where a duplicate's goes", RECOVER, "def _recover_beside", "move(put_away, place)"
    ),
    without(
        "recovery: what lay beside the data is left",
        RECOVER,
        "def _recover_beside",
        "take_beside(ledger, home, job, home.inbox / job.profile, read_beside(home.job(job.id)))",
    ),
    Mutant(
        "recovery: a retry is not gone on with",
        RECOVER,
        "def _recover_claim",
        {"(home.failed / job.id).is_dir()": "False"},
    ),
    Mutant(
        "lost ledger: published is forgotten",
        REBUILD,
        "def _unfinished",
        {"adapters[spec.id][0] if spec.id in adapters else None": "None"},
    ),
    Mutant("lost ledger: an old reason counts", REBUILD, "def _unfinished", {" and spec.id not in adapters": ""}),
    Mutant("recovery: published without D10", RECOVER, "def _recover_run", {"if published(home, job)": "if False"}),
]

# Not in the list, since nothing can tell the difference: D1 between D3 and D4, for job.json is there by then and holds
# all of the row; D13 before D12, for the folder holds nothing by then that is not elsewhere; reason.json after the
# input, for both are repeated until the job is finished; a copy under its last name, which counts for nothing while the
# original is in the inbox.


def caught(mutant: Mutant) -> str:
    """Let the model look for a crash that breaks the mutant. Gives what was broken, or nothing if it survived."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "finetuned")
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "trainer"))
        mutant.apply(package)
        done = subprocess.run(
            [sys.executable, "-c", "import crash_scenarios; crash_scenarios.until_broken()"],
            env={**os.environ, "PYTHONPATH": f"{folder}:{TESTS}"},
            capture_output=True,
            text=True,
            check=False,
        )
    if bool(done.returncode) != bool(done.stdout):  # it broke without a crash to tell of
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


def main() -> int:
    """Try all mutants, or those whose name holds a word of the command line, two at a time."""
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in sys.argv[1:])]
    survivors = 0
    with ThreadPoolExecutor(int(os.environ.get("WORKERS", "2"))) as pool:
        for mutant, how in zip(chosen, pool.map(caught, chosen), strict=True):
            survivors += not how
            print(f"{mutant.name:50} {'caught by ' + how if how else 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - survivors} caught, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
