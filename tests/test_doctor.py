"""`finetuned doctor`: each check is made to fail, by what makes it fail in life."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from conftest import write_config
from finetuned.doctor.finding import Verdict
from finetuned.doctor.machine import check_bitsandbytes, check_clock, check_jemalloc, check_python
from fixtures_pretended import PretendedSlurm, answering

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to build a fake libcuda.so.1")

CUDA = """
int cuInit(unsigned flags) { (void)flags; %s }
int cuGetErrorName(int code, const char **name) { *name = code ? "CUDA_ERROR_OF_TEST" : "CUDA_SUCCESS"; return 0; }
"""


@pytest.fixture
def libraries(tmp_path) -> Path:
    """A folder in front of Python's path, with a bitsandbytes that is imported in no time."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    (folder / "bitsandbytes.py").write_text("__version__ = '1.2.3'\n")
    return folder


@pytest.fixture
def doctor(home, libraries, tmp_path):
    """Run the real program; give its findings by name."""

    def run(*options: str, code: int = 0, mount: str = "", base: Path | None = None, **environment: str):
        path = os.pathsep.join(filter(None, (str(libraries), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "finetuned", "doctor", "--base-dir", str(base or home.root), *options]
        if mount:
            command = ["unshare", "--mount", "sh", "-ec", f'{mount}\nexec "$@"', "sh", *command]
        done = subprocess.run(
            [*command, "--json"],
            env={**os.environ, **environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return {finding["check"]: finding for finding in json.loads(done.stdout)}

    return run


def libcuda(folder: Path, body: str) -> str:
    """Build a CUDA driver library; give the folder for LD_LIBRARY_PATH."""
    source = folder / "cuda.c"
    source.write_text(CUDA % body)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return str(folder)


def test_a_machine_that_is_fit_passes_every_check(doctor):
    findings = doctor()
    assert {f["verdict"] for f in findings.values()} <= {"ok", "warn"}
    assert {"python", "versions", "cuda", "bitsandbytes", "jemalloc", "clock"} <= findings.keys()
    assert {"config", "folders", "one mount", "disk", "daemon", "inotify"} <= findings.keys()
    assert findings["bitsandbytes"]["what"] == "1.2.3 can be imported"
    assert "renamed" in findings["one mount"]["what"]


def test_for_people_it_is_a_line_each_with_the_remedy_below(home, libraries):
    home.config_file.write_text("{broken")
    done = subprocess.run(
        [sys.executable, "-m", "finetuned", "doctor", "--base-dir", str(home.root)],
        env={**os.environ, "PYTHONPATH": f"{libraries}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (number,) = (n for n, line in enumerate(lines) if line.startswith("fail"))
    assert "config" in lines[number]
    assert "is not JSON" in lines[number]
    assert "Mend the file" in lines[number + 1]


def test_without_a_base_directory_the_machine_is_checked_all_the_same(doctor, tmp_path):
    findings = doctor(code=1, base=tmp_path)
    assert findings["base directory"]["verdict"] == "fail"
    assert "finetuned init" in findings["base directory"]["remedy"]
    assert findings["python"]["verdict"] == "ok"


# -- the machine


def test_an_old_python_fails():
    assert check_python((3, 10, 4)).verdict is Verdict.FAIL


def test_a_library_other_than_the_tested_one_is_named_with_both_versions(doctor, libraries):
    (libraries / "peft-0.0.1.dist-info").mkdir()
    (libraries / "peft-0.0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    finding = doctor()["versions"]
    assert finding["verdict"] == "warn"
    assert "peft 0.0.1 (tested: " in finding["what"]


def test_libraries_that_are_not_installed_fail(home):
    """A Python that sees the daemon's libraries and not the trainer's."""
    script = (
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'torch': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from finetuned.doctor.machine import check_versions\n"
        "print(check_versions())"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "FAIL" in said
    assert "not installed: torch" in said


@needs_gcc
def test_a_gpu_whose_cuda_does_not_start_fails_though_nvml_shows_it(doctor, fake_nvml, tmp_path):
    driver = libcuda(fake_nvml.library, "return 999;")
    finding = doctor(code=1, **fake_nvml.environment() | {"LD_LIBRARY_PATH": driver})["cuda"]
    assert finding["verdict"] == "fail"
    assert "CUDA_ERROR_OF_TEST (999)" in finding["what"]
    assert "nvidia-modprobe" in finding["remedy"]


@needs_gcc
def test_a_gpu_whose_cuda_starts_is_named(doctor, fake_nvml):
    driver = libcuda(fake_nvml.library, "return 0;")
    finding = doctor(**fake_nvml.environment() | {"LD_LIBRARY_PATH": driver})["cuda"]
    assert finding["verdict"] == "ok"
    assert "H100" in finding["what"]


@needs_gcc
def test_a_driver_that_crashes_does_not_take_the_doctor_with_it(doctor, tmp_path):
    finding = doctor(code=1, LD_LIBRARY_PATH=libcuda(tmp_path, "return *(volatile int *)0;"))["cuda"]
    assert finding["verdict"] == "fail"
    assert "cuInit ended with -11" in finding["what"]


@needs_gcc
def test_a_driver_without_a_gpu_is_a_warning(doctor, tmp_path):
    finding = doctor(LD_LIBRARY_PATH=libcuda(tmp_path, "return 100;"))["cuda"]
    assert finding["verdict"] == "warn"


def test_a_gpu_without_a_cuda_library_fails(doctor, fake_nvml):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a CUDA library of its own")
    (fake_nvml.library / "libcuda.so.1").unlink(missing_ok=True)
    finding = doctor(code=1, **fake_nvml.environment())["cuda"]
    assert finding["verdict"] == "fail"
    assert "no libcuda.so.1" in finding["what"]


def test_a_bitsandbytes_that_cannot_be_imported_is_a_warning_without_a_gpu(doctor, libraries):
    (libraries / "bitsandbytes.py").write_text("raise RuntimeError('CUDA setup failed')\n")
    finding = doctor()["bitsandbytes"]
    assert finding["verdict"] == "warn"
    assert "CUDA setup failed" in finding["what"]


@needs_gcc
def test_and_a_failure_with_one(doctor, fake_nvml, libraries):
    (libraries / "bitsandbytes.py").write_text("raise RuntimeError('CUDA setup failed')\n")
    driver = libcuda(fake_nvml.library, "return 0;")
    findings = doctor(code=1, **fake_nvml.environment() | {"LD_LIBRARY_PATH": driver})
    assert [name for name, finding in findings.items() if finding["verdict"] == "fail"] == ["bitsandbytes"]


def test_the_real_bitsandbytes_can_be_imported():
    assert check_bitsandbytes(needed=True).verdict is Verdict.OK


def test_jemalloc_is_missed_where_training_runs_on_the_cpu_alone(tmp_path):
    assert check_jemalloc(needed=True, usr=tmp_path).verdict is Verdict.WARN
    assert check_jemalloc(needed=False, usr=tmp_path).verdict is Verdict.OK
    installed = tmp_path / "installed"
    (installed / "lib").mkdir(parents=True)
    (installed / "lib/libjemalloc.so.2").touch()
    assert check_jemalloc(needed=True, usr=installed).verdict is Verdict.OK


def test_a_clock_of_another_age_fails():
    assert check_clock(datetime(1970, 1, 1, tzinfo=UTC)).verdict is Verdict.FAIL
    assert check_clock(datetime(2106, 2, 7, tzinfo=UTC)).verdict is Verdict.FAIL


def test_a_clock_that_nobody_sets_is_a_warning(doctor, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "timedatectl").write_text("#!/bin/sh\necho no\n")
    (programs / "timedatectl").chmod(0o755)
    finding = doctor(PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")["clock"]
    assert finding["verdict"] == "warn"


# -- the base directory


def test_a_setting_that_does_not_exist_fails_with_what_was_meant(doctor, home):
    write_config(home, epoch=3)
    finding = doctor(code=1)["config"]
    assert finding["verdict"] == "fail"
    assert "did you mean epochs?" in finding["what"]


def test_a_config_that_everybody_may_change_is_a_warning(doctor, home):
    home.config_file.chmod(0o666)
    assert doctor()["config"]["verdict"] == "warn"


@needs_root
def test_a_folder_that_may_not_be_written_to_fails(doctor, home):
    finding = doctor(
        code=1, mount=f"mount --bind {home.adapters} {home.adapters}\nmount -o remount,bind,ro {home.adapters}"
    )
    assert finding["folders"]["verdict"] == "fail"
    assert str(home.adapters) in finding["folders"]["what"]


@needs_root
def test_an_inbox_that_is_a_mount_of_its_own_fails(doctor, home):
    finding = doctor(code=1, mount=f"mount --bind {home.inbox} {home.inbox}")["one mount"]
    assert finding["verdict"] == "fail"
    assert "Mount the base directory as a whole" in finding["remedy"]


@needs_root
def test_a_disk_that_is_nearly_full_fails(doctor, home):
    base = home.root
    copy = f"cp -a {base}/. {base}.copy && mount -t tmpfs -o size=8m none {base} && cp -a {base}.copy/. {base}"
    finding = doctor(code=1, mount=f"mkdir {base}.copy\n{copy}")["disk"]
    assert finding["verdict"] == "fail"
    assert "0.0 GiB free" in finding["what"]


def test_a_daemon_at_work_is_named(doctor, home, daemon, standin):
    one = daemon()
    one.says("finetuned starts")
    finding = doctor()["daemon"]
    assert finding["verdict"] == "ok"
    assert f"pid {one.process.pid}" in finding["what"]


@pytest.mark.parametrize("content", ["999999999\n", "no number"])
def test_a_lock_whose_holder_cannot_be_seen_fails(doctor, home, content):
    home.lock.write_text(content)
    with home.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finding = doctor(code=1)["daemon"]
    assert finding["verdict"] == "fail"
    assert "fuser" in finding["remedy"]


def test_a_daemon_on_another_machine_is_named_with_that(doctor, home):
    home.lock.write_text("4711 far-away another-boot\n")
    with home.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finding = doctor()["daemon"]
    assert (finding["verdict"], finding["what"]) == ("ok", "at work: pid 4711 on far-away")


@needs_root
def test_a_kernel_that_lets_nobody_watch_is_a_warning(doctor, home):
    """The limit of a user namespace of the test's own stands in for a machine whose watches are used up."""
    if subprocess.run(["unshare", "-Ur", "true"], check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    command = ["unshare", "-Ur", "sh", "-ec", 'echo 0 > /proc/sys/user/max_inotify_instances; exec "$@"', "sh"]
    script = (
        "import sys; from pathlib import Path; from finetuned.home import Home;"
        "from finetuned.doctor.place import check_inotify;"
        "print(check_inotify(Home(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [*command, sys.executable, "-c", script, str(home.root)], capture_output=True, text=True, check=True
    )
    assert "WARN" in done.stdout
    assert "Too many open files" in done.stdout


# -- where jobs run


def test_places_that_config_json_does_not_name_are_not_checked(doctor):
    assert not {"gpus", "ray", "slurm"} & doctor().keys()


@needs_gcc
def test_a_gpu_that_config_json_names_and_that_is_not_there_fails(doctor, home, fake_nvml):
    driver = libcuda(fake_nvml.library, "return 0;")
    environment = fake_nvml.environment() | {"LD_LIBRARY_PATH": driver}
    write_config(home, gpus=[0])
    assert doctor(**environment)["gpus"]["verdict"] == "ok"
    write_config(home, gpus=[0, 7])
    finding = doctor(code=1, **environment)["gpus"]
    assert finding["verdict"] == "fail"
    assert "names 7, which" in finding["what"]
    assert "0: GPU-" in finding["what"]


def test_a_ray_that_a_profile_names_must_answer(doctor, home):
    with answering() as answers:
        write_config(home, profiles={"far": {"launcher": "ray"}}, ray={"address": answers.address})
        assert doctor()["ray"] == {
            "check": "ray",
            "verdict": "ok",
            "what": f"answers at {answers.address}",
            "remedy": "",
        }
        answers.info = 401, "no token"
        assert "401: no token" in doctor(code=1)["ray"]["what"]
    finding = doctor(code=1)["ray"]
    assert "cannot be reached" in finding["what"]
    assert "`address`" in finding["remedy"]


def test_a_token_file_that_cannot_be_read_fails(doctor, home):
    write_config(home, launcher="ray", ray={"token_file": str(home.root / "token")})
    finding = doctor(code=1)["ray"]
    assert "token_file" in finding["what"]
    assert "cannot be read" in finding["what"]


def test_a_slurm_must_have_its_commands_its_template_and_answer(doctor, home, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    write_config(home, launcher="slurm", slurm={"template": "far.sh"})
    assert "no sbatch" in doctor(code=1, PATH=str(nothing))["slurm"]["what"]
    slurm = PretendedSlurm(tmp_path / "slurm")
    path = f"{slurm.folder}{os.pathsep}{os.environ['PATH']}"
    assert "far.sh: the template for Slurm cannot be read" in doctor(code=1, PATH=path)["slurm"]["what"]
    (home.root / "far.sh").write_text("#!/bin/sh\n{command}\n")
    assert doctor(PATH=path)["slurm"]["verdict"] == "ok"
    slurm.goes_away()
    finding = doctor(code=1, PATH=path)["slurm"]
    assert "does not answer" in finding["what"]
    assert "sinfo" in finding["remedy"]
