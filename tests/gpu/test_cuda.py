"""What only a GPU can show: its out-of-memory, its 4-bit layers, its number formats."""

import math
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import chat_rows, write_jsonl
from finetuned.events import EventType, ExitCode
from precision_facts import SETTINGS
from test_precision import TUNINGS, assert_as_the_table_says, facts_of
from test_training import Run, assert_same_weights, long_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}  # as set, and as torch calls them

# The trainer itself, in a process that may have only a share of the GPU.
SHARE = (
    "import runpy, torch; torch.cuda.set_per_process_memory_fraction({share}); "
    "runpy.run_module('finetuned.trainer', run_name='__main__', alter_sys=True)"
)


@pytest.fixture
def job(tmp_path, tiny_model):
    """Make a job on the tiny model which evaluates and asks before, between and after: `job(**settings)`."""
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(24))
    held_out = write_jsonl(tmp_path / "held-out.jsonl", chat_rows(6, start=100))
    asking = {"eval_file": str(held_out), "eval_steps": 3, "predictions": {"samples": 2, "max_new_tokens": 8}}
    return lambda **settings: Run(tmp_path / "job", data, model=str(tiny_model), **asking, **settings)


def test_cuda_out_of_memory_is_survived_in_the_process_to_the_same_weights(tmp_path, tiny_model):
    """Nothing is restarted: the GPU's allocator gives memory back."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 16384, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=258, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, **sizes)
    ).save_pretrained(model)
    rows = write_jsonl(tmp_path / "data.jsonl", long_rows(8, 900))
    settings = {"model": str(model), "tuning": "lora", "max_length": 1024, "learning_rate": 5e-4}
    four = Run(tmp_path / "4x1", rows, batch_size=4, **settings).done()
    one = Run(tmp_path / "1x4", rows, batch_size=1, gradient_accumulation=4, **settings).done()
    most, least = (run.steps()[-1]["peak_memory"] for run in (four, one))
    a_row = (most - least) / 3
    assert a_row > 100 * 2**20, "too little to tell apart"

    run = Run(tmp_path / "job", rows, batch_size=4, **settings)
    share = (least + 0.8 * a_row) / torch.cuda.get_device_properties(0).total_memory
    run.command = [sys.executable, "-c", SHARE.format(share=share)]
    assert run.attempt() == ExitCode.DONE, run.log[-3000:]
    rungs = [event for event in run.events(EventType.RUNG) if event.data["rung"]["batch_size"] < 4]
    assert [event.data["rung"]["batch_size"] for event in rungs] == [2, 1]
    assert all("out of memory" in event.data["reason"] for event in rungs)
    for undisturbed in (four, one):
        assert_same_weights(run, undisturbed, tolerance=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_learns_and_answers(job, tuning, dtype):
    run = job(tuning=tuning, dtype=dtype, learning_rate=1e-3 if tuning == "full" else 5e-3)
    assert run.attempt() == ExitCode.DONE, run.log[-3000:]
    (plan,) = run.events(EventType.PLAN)
    assert plan.data["device"].startswith("cuda")
    assert plan.data["choices"]["dtype"]["choice"] == DTYPES[dtype]
    asked = run.events(EventType.PREDICTIONS)
    assert [event.message for event in asked] == [
        f"predictions saved=2 errors=0 exact={sum(sample['exact'] for sample in event.data['samples'])}/2 step={step}"
        for event, step in zip(asked, (0, 3, 6), strict=True)
    ]
    assert all(sample["error"] is None and sample["seconds"] > 0 for event in asked for sample in event.data["samples"])
    (result,) = run.events(EventType.RESULT)
    assert result.data["valid_loss"] < result.data["valid_loss_before"] - 0.05
    norms = [step["grad_norm"] for step in run.steps()]
    # A gradient scaler finds its scale by trying: the first steps may be skipped for an infinite norm.
    assert all(norm > 0 for norm in norms)
    assert all(math.isfinite(norm) for norm in norms[3 if dtype == "fp16" else 0 :])
    assert {tensor.dtype for tensor in run.weights().values()} == {torch.float32}


@pytest.fixture(scope="module", params=TUNINGS)
def of_a_tuning(request, tiny_model, tmp_path_factory) -> tuple[str, dict]:
    return request.param, facts_of(tiny_model, request.param, "cuda", tmp_path_factory.mktemp("facts"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_tensors_are_what_the_table_says_on_a_gpu(of_a_tuning, setting):
    tuning, facts = of_a_tuning
    automatic = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    computed = {"auto": automatic, "bf16": "bfloat16", "fp16": "float16", "float32": "float32"}[setting]
    assert_as_the_table_says(facts[setting], tuning, computed)


def test_auto_is_qlora_on_a_gpu_and_its_adapter_fits_the_whole_base(job, tiny_model):
    from peft import PeftModel

    run = job(dtype="auto", learning_rate=5e-3)
    assert run.attempt() == ExitCode.DONE, run.log[-3000:]
    (plan,) = run.events(EventType.PLAN)
    assert plan.data["rung"]["tuning"] == "qlora"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.adapter).cuda()
    ids = torch.arange(2, 40, device="cuda").unsqueeze(0)
    with torch.no_grad():
        logits = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, logits)
    assert logits.isfinite().all()
