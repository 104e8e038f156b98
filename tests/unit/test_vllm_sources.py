"""vLLM as its sources are: the names that we lean on, and what holds on a GPU, without importing it.

The files are in the CPU build too. `TINK_VLLM_SOURCES` names another release's, which may be one that
cannot be installed here.
"""

from __future__ import annotations

import pytest

from tests import vllm_sources
from tests.vllm_sources import function
from tink_rl.seam import Name
from tink_rl.server.vllm_names import NAMES, USED

pytestmark = pytest.mark.skipif(vllm_sources.folder() is None, reason="vLLM is not installed")


@pytest.mark.parametrize("path", NAMES.values())
def test_name_that_is_imported_is_in_the_sources(path):
    assert vllm_sources.find(path) is not None


@pytest.mark.parametrize("name", USED, ids=lambda name: name.path.rpartition(":")[2])
def test_name_that_is_used_is_called_as_the_sources_say(name):
    found = vllm_sources.find(name.path)
    assert found is not None
    if name.exactly or name.accepts:
        assert name.misfit_of(vllm_sources.parameters(found)) is None


def test_name_that_is_not_in_the_sources_is_found_missing():
    manager = NAMES["LRUCacheWorkerLoRAManager"]
    for path in ("vllm.nothing", "vllm.lora.lora_model:Nothing", f"{manager}.nothing"):
        assert vllm_sources.find(path) is None
    load = vllm_sources.parameters(vllm_sources.find(f"{manager}._load_adapter"))
    assert Name("x", exactly=("self",)).misfit_of(load) and Name("x", accepts=("y",)).misfit_of(
        load
    )


def test_model_runner_of_gpus_loads_adapters_through_the_name_that_we_replace():
    runner = function("v1/worker/gpu/model_runner.py", "GPUModelRunner")
    assert "LoRAModelRunnerMixin" in runner.splitlines()[0]
    assert "def get_model(" in runner
    mixin = function("v1/worker/lora_model_runner_mixin.py", "LoRAModelRunnerMixin")
    assert "LRUCacheWorkerLoRAManager(" in mixin  # a global of that module, looked up when called
    for name in ("reset_lora_state", "add_lora", "remove_lora"):
        assert f"def {name}(" in mixin


def test_reload_copies_into_the_tensors_that_captured_graphs_know():
    path = "model_executor/model_loader/reload/layerwise.py"
    assert ".data.copy_(" in function(path, "_copy_and_restore_kernel_tensors")
    place = function(path, "_place_kernel_tensors")
    assert "register_parameter(name, param)" in place  # the same Parameter again


def test_unquantised_weight_is_left_as_loaded_on_cuda():
    text = function("model_executor/layers/linear.py", "UnquantizedLinearMethod")
    process = text[text.index("def process_weights_after_loading") :]
    process = process[: process.index("def apply")]
    assert "is_cpu()" in process and "cuda" not in process


def test_slots_on_cuda_take_no_fp32():
    shrink = function("lora/ops/triton_ops/lora_shrink_op.py", "_lora_shrink")
    assert "assert inputs.dtype in [torch.float16, torch.bfloat16]" in shrink
    for text in (shrink, function("lora/ops/triton_ops/lora_expand_op.py", "_lora_expand")):
        assert "assert weight.dtype in [torch.float16, torch.bfloat16]" in text


def test_only_latent_attention_makes_parameters_of_a_weight():
    folder = vllm_sources.folder() / "model_executor/layers/attention"
    found = {f.stem for f in folder.glob("*.py") if "replace_parameter(self" in f.read_text()}
    assert found == {"mla_attention"}
