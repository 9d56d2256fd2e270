"""What a user reads when the memory ladder has no rung left."""

from dataclasses import replace

import pytest

from finetuned.fallback import Rung
from finetuned.trainer.ends import Means, OutOfMeansError, readable, wanted_bytes

FOOT = Rung(1, 8, activation_checkpointing=True, tuning="lora", max_length=2048)
CUDA = (
    "CUDA out of memory. Tried to allocate 3.05 GiB. GPU 0 has a total capacity of 23.57 GiB of which 1.06 GiB is free."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1073741824 bytes."
)
GPU = Means("the GPU", total=24 * 2**30, parameters=7_000_000_000, longest=2013)


def said(rung: Rung, detail: str, means: Means) -> tuple[str, str]:
    error = OutOfMeansError(rung, detail, means).for_user()
    assert error.code == "out_of_memory"
    return error.what, error.remedy


def test_it_says_what_was_needed_what_there_is_and_which_settings_help():
    what, remedy = said(FOOT, CUDA, GPU)
    assert what == (
        "memory ran out at 1 x 8, activation checkpointing, lora: 3.0 GiB more were needed, and "
        "the GPU has 24 GiB in all"
    )
    assert remedy == (
        'Set tuning to "qlora" (it is "lora"), or fallback_4bit to true; or set max_length to 1024 (it is 2048, the '
        "longest row has 2013 tokens), or fallback_max_length to true; or set model to a smaller one (this one has "
        "7,000 million parameters)."
    )


def test_what_is_done_already_is_not_advised():
    _, remedy = said(replace(FOOT, tuning="qlora"), CUDA, replace(GPU, allow_shorter=True))
    assert "tuning" not in remedy
    assert "4bit" not in remedy
    assert "fallback_max_length" not in remedy
    assert remedy.startswith("Set max_length to 1024")


def test_a_4bit_fallback_that_is_allowed_is_not_advised():
    assert "qlora" not in said(FOOT, CUDA, replace(GPU, allow_4bit=True))[1]


@pytest.mark.parametrize("longest", [300, 128, 0])
def test_rows_that_are_short_are_not_to_be_cut(longest):
    """Then max_length is not what takes the memory, however high it stands."""
    assert "max_length" not in said(FOOT, CUDA, replace(GPU, longest=longest))[1]


def test_rows_shorter_than_max_length_are_cut_by_what_they_are():
    """Half of max_length would cut nothing."""
    assert (
        "set max_length to 512 (it is 8192, the longest row has 1000"
        in said(replace(FOOT, max_length=8192), CUDA, replace(GPU, longest=1000))[1]
    )


def test_a_full_fine_tune_is_told_what_all_weights_take():
    _, remedy = said(replace(FOOT, tuning="full"), CPU, replace(GPU, device="the machine", parameters=2**30))
    assert remedy.startswith('Set tuning to "lora" (it is "full": all weights take 16 GiB before the first row)')
    assert "qlora" not in remedy


def test_a_model_that_does_not_fit_is_not_helped_by_shorter_rows():
    what, remedy = said(replace(FOOT, tuning="qlora"), CPU, Means("the machine", total=2**30))
    assert "while the model was loaded: 1.0 GiB more were needed, and the machine has 1.0 GiB in all" in what
    assert remedy == "Set model to a smaller one."


def test_other_programs_on_the_gpu_are_named_first():
    what, remedy = said(FOOT, CUDA, replace(GPU, others=20 * 2**30))
    assert "of which other programs hold 20 GiB" in what
    assert remedy.startswith("End the other programs on the GPU; or ")
    assert "other programs" not in "".join(said(FOOT, CUDA, replace(GPU, others=2**30)))


def test_an_error_without_figures_is_quoted():
    assert "std::bad_alloc" in said(FOOT, "std::bad_alloc", GPU)[0]
    assert said(FOOT, "std::bad_alloc", Means("the machine"))[1]


@pytest.mark.parametrize(
    ("detail", "size"),
    [
        (CUDA, int(3.05 * 2**30)),
        (CPU, 2**30),
        ("HIP out of memory. Tried to allocate 20.00 MiB.", 20 * 2**20),
        ("DefaultCPUAllocator: not enough memory: you tried 8 bytes.", 8),
        ("unable to mmap 1024 bytes from file </a>: Cannot allocate memory (12)", 1024),
        ("Unable to allocate 512. KiB for an array with shape (1024,)", 512 * 2**10),
        ("could not create a primitive", 0),
    ],
)
def test_the_allocators_figures_are_read(detail, size):
    assert wanted_bytes(detail) == size


@pytest.mark.parametrize(
    ("size", "text"), [(64, "64 bytes"), (1536, "1.5 KiB"), (20 * 2**20, "20 MiB"), (int(3.05 * 2**30), "3.0 GiB")]
)
def test_bytes_are_readable(size, text):
    assert readable(size) == text
