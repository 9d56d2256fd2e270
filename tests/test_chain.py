"""Which adapter a job builds on, and what keeps one from being continued."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from finetuned.config import settings_from
from finetuned.errors import ConfigError
from finetuned.home import Home, JobFolder
from finetuned.jobs import FileIdentity, JobSpec
from finetuned.trainer.chain import settle

BASE = "hub/model"
SPEC = JobSpec(
    id="a-job",
    name="x.jsonl",
    profile="p",
    identity=FileIdentity(1, 2, 3, 4),
    created_at=0.0,
    input="x",
    settings={},
    rung={},
)


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path)
    home.adapters.mkdir()
    return home


@pytest.fixture
def job(tmp_path) -> JobFolder:
    (tmp_path / "job").mkdir()
    return JobFolder(tmp_path / "job")


def adapter(home: Home, name: str, *, profile: str = "p", finished_at: float = 1.0, chain=(), **changes) -> Path:
    folder = home.adapters / name
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 16, "lora_alpha": 32.0, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(name.encode())
    story = {"job_id": f"{name}-job", "sha256": f"{name}-data", "profile": profile, "finished_at": finished_at}
    (folder / "finetuned.json").write_text(json.dumps({**story, "chain": list(chain), "settings": {"revision": None}}))
    return folder


def earlier(home: Home, job: JobFolder, setting: str | None = "latest", *, profile: str = "p", **settings):
    spec = replace(SPEC, profile=profile, base_dir=str(home.root))
    return settle(job, spec, settings_from({"resume_adapter": setting, **settings}, where="the test"), BASE)


def refused(home: Home, job: JobFolder, setting: str, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        earlier(home, job, setting, **settings)
    assert caught.value.remedy
    assert not job.earlier.exists()
    return str(caught.value)


def test_nothing_is_built_on_where_nothing_is_named(home, job):
    adapter(home, "a")
    assert earlier(home, job, None) is None


def test_latest_is_the_newest_of_the_same_profile(home, job):
    adapter(home, "old", finished_at=5)
    adapter(home, "new", finished_at=7)
    adapter(home, "a-middle", finished_at=6)
    adapter(home, "another", finished_at=9, profile="q")
    adapter(home, "default", finished_at=8, profile="")
    (home.adapters / "latest").symlink_to("another")
    found = earlier(home, job)
    assert found.folder
    assert (found.folder / "adapter_model.safetensors").read_bytes() == b"new"
    assert found.chain == [{"adapter": "new", "job_id": "new-job", "sha256": "new-data"}]


def test_files_without_a_profile_build_on_those_without_one(home, job):
    adapter(home, "of-profile", finished_at=9)
    adapter(home, "default", finished_at=8, profile="")
    assert str(earlier(home, job, profile="")) == "default"


def test_the_first_of_a_profile_starts_fresh_and_says_so(home, job):
    adapter(home, "another", profile="q")
    (home.adapters / "made-elsewhere").mkdir()
    found = earlier(home, job)
    assert found.folder is None
    assert found.chain == []
    assert "starting fresh" in found.reason
    assert "profile p" in found.reason


def test_what_the_first_attempt_chose_every_later_one_builds_on(home, job):
    """Also when a newer adapter has come, or the chosen one is gone."""
    chosen = adapter(home, "chosen", finished_at=1)
    first = earlier(home, job)
    adapter(home, "newer", finished_at=2)
    shutil.rmtree(chosen)
    assert earlier(home, job) == first
    assert (first.folder / "adapter_model.safetensors").read_bytes() == b"chosen"


def test_a_fresh_start_stays_one(home, job):
    earlier(home, job)
    adapter(home, "newer")
    assert earlier(home, job).folder is None


def test_a_path_counts_from_the_base_directory_and_a_link_is_followed(home, job):
    adapter(home, "a", profile="q", chain=[{"adapter": "first", "job_id": "1", "sha256": "2"}])
    (home.adapters / "latest").symlink_to("a")
    found = earlier(home, job, "adapters/latest")
    assert [link["adapter"] for link in found.chain] == ["first", "a"]


def test_an_adapter_made_elsewhere_can_be_continued(home, job):
    folder = adapter(home, "a")
    (folder / "finetuned.json").unlink()
    assert earlier(home, job, str(folder)).chain == [{"adapter": "a", "job_id": None, "sha256": None}]


def test_all_that_differs_is_told_at_once(home, job):
    adapter(home, "a", r=8, lora_alpha=8, use_dora=True, base_model_name_or_path="hub/other")
    said = refused(home, job, "latest", use_rslora=True, revision="v2")
    for part in (
        "lora_r 8 (now 16)",
        "lora_alpha 8 (now 32",
        "use_dora True",
        "use_rslora False",
        "hub/other",
        "v2",
    ):
        assert part in said
    assert "adapters/a" in said


def test_what_is_no_adapter_is_refused(home, job):
    assert "no such folder" in refused(home, job, "adapters/none")
    (home.adapters / "empty").mkdir()
    assert "no LoRA adapter" in refused(home, job, "adapters/empty")
    (home.adapters / "whole").mkdir()
    (home.adapters / "whole" / "config.json").write_text("{}")
    assert 'as "model"' in refused(home, job, "adapters/whole")
    adapter(home, "other-kind", peft_type="IA3")
    assert "no LoRA adapter" in refused(home, job, "adapters/other-kind")
