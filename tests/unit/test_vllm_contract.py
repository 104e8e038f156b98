"""The private names of vLLM and the seam of TRL: fails loudly when one moves."""

from __future__ import annotations

import inspect
import multiprocessing
import sys
import warnings
from types import SimpleNamespace

import pytest
import trl

from tests import vllm_sources
from tink_rl.errors import ConfigError

vllm = pytest.importorskip("vllm", reason="the server extra is not installed")


LATER = {"mm_payload", "return_mm_kwargs", "return_weight_versions"}
"""Fields of 0.32 and 0.33: of images, and of an answer that is not read here. They are never sent."""


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_names_of_vllm_are_where_they_were():
    from tink_rl.server import vllm_names as names

    names.check()
    for name in names.NAMES:
        assert getattr(names, name) is not None
    exact = {name.path.partition(":")[2]: list(name.exactly) for name in names.USED}
    load = names.LRUCacheWorkerLoRAManager._load_adapter
    assert parameters(load) == ["self", "lora_request"]
    assert parameters(load) == exact["LRUCacheWorkerLoRAManager._load_adapter"]
    create = names.LRUCacheWorkerLoRAManager.create_lora_manager
    assert parameters(create) == ["self", "model", "vllm_config"]
    assert parameters(create) == exact["LRUCacheWorkerLoRAManager.create_lora_manager"]
    wanted = ["lora_model_id", "tensors", "peft_helper", "device", "dtype", "model_vocab_size"]
    assert parameters(names.LoRAModel.from_lora_tensors)[:6] == wanted
    assert parameters(names.initialize_layerwise_reload) == ["model"]
    assert hasattr(names.lora_model_runner_mixin, "LRUCacheWorkerLoRAManager")
    assert "sched_yield()" in inspect.getsource(names.shm_broadcast.SpinCondition.wait)


def test_name_that_is_gone_ends_the_start_of_our_server(monkeypatch, stock_vllm, tmp_path):
    from vllm.lora import lora_model

    from tink_rl.server.plugin import register

    monkeypatch.setenv("TINK_SERVER_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.delattr(lora_model, "LoRAModel")
    with pytest.raises(ConfigError, match=r"lora_model:LoRAModel is not there.*Known good: vllm"):
        register()


def test_plain_vllm_that_has_moved_a_name_is_left_alone(monkeypatch, stock_vllm, caplog):
    from tink_rl.server import vllm_names as names
    from tink_rl.server.plugin import register

    monkeypatch.delenv("TINK_SERVER_TOKEN_FILE", raising=False)
    monkeypatch.setattr(
        names.LRUCacheWorkerLoRAManager, "_load_adapter", lambda self, lora_request, pinned: None
    )
    register()
    assert "takes self, lora_request, pinned; expected self, lora_request" in caplog.text
    manager = names.lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    assert manager is names.LRUCacheWorkerLoRAManager


def test_vllm_that_was_never_tested_is_told_once(monkeypatch):
    from tink_rl.server import vllm_names as names

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        names.check()
        names.check()
    assert [str(one.message)[:30] for one in told] == ["vllm 0.99.0 was never tested w"]


def test_fields_of_a_request_are_vllms():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from tink_rl.transport.request_fields import CHAT_FIELDS, ELSEWHERE, FIELDS

    assert set(FIELDS) == set(CompletionRequest.model_fields) - LATER
    assert set(CHAT_FIELDS) == set(ChatCompletionRequest.model_fields) - LATER
    assert not set(ELSEWHERE) & set(FIELDS)


def test_keys_of_structured_outputs_are_vllms():
    from vllm.sampling_params import StructuredOutputsParams

    from tink_rl.transport.request_fields import GRAMMAR

    assert set(parameters(StructuredOutputsParams)) == set(GRAMMAR)


def test_loader_asks_which_files_to_load_where_ours_answers():
    from tink_rl.server.vllm_names import default_loader

    source = inspect.getsource(default_loader.DefaultModelLoader._prepare_weights)
    assert "filter_duplicate_safetensors_files(" in source
    original = inspect.unwrap(default_loader.filter_duplicate_safetensors_files)
    assert parameters(original) == ["hf_weights_files", "hf_folder", "index_file"]
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER

    assert "hf" in _LOAD_FORMAT_TO_MODEL_LOADER and "hf" in _CONFIG_FORMAT_TO_CONFIG_PARSER


def test_loader_leaves_out_what_is_no_checkpoint(tmp_path):
    from tink_rl.server.base_files import load_only_the_checkpoint
    from tink_rl.server.vllm_names import default_loader

    load_only_the_checkpoint()
    names = ["model.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    given, folder = [f"{tmp_path}//{name}" for name in names], f"{tmp_path}/"
    choose = default_loader.filter_duplicate_safetensors_files
    assert choose(given, folder, "model.safetensors.index.json") == given[:1]
    assert choose(given, folder, "consolidated.safetensors.index.json") == given


def test_ids_beyond_the_embedding_are_refused_before_the_engine_sees_them():
    from tink_rl.server.id_guard import check_request
    from tink_rl.server.vllm_names import InputProcessor, VLLMValidationError

    source = inspect.getsource(InputProcessor.process_inputs)
    assert "return EngineCoreRequest(" in source and "update_from_tokenizer" in source

    def ask(ids, words=None, images=None):
        params = SimpleNamespace(bad_words_token_ids=words)
        check_request(
            SimpleNamespace(prompt_token_ids=ids, sampling_params=params, mm_features=images), 64
        )

    ask([0, 63], [[63]])
    ask(None)
    ask([70], images=["an image"])
    for bad in (([5, 64],), ([5], [[1], [64]])):
        with pytest.raises(VLLMValidationError, match=r"holds token id 64.* from 0 to 63"):
            ask(*bad)


def test_request_for_ids_alone_is_not_decoded_unless_a_stop_string_is_looked_for():
    from vllm import SamplingParams
    from vllm.v1.engine.output_processor import RequestState

    from tink_rl.server.ids_only import leave_out_texts
    from tink_rl.types import IDS_ONLY

    asked = {"extra_args": {IDS_ONLY: 1}}
    for given, decodes in ((asked, False), ({}, True), ({**asked, "stop": ["x"]}, True)):
        params = SamplingParams(**given)
        leave_out_texts(params)
        assert params.detokenize is decodes
    leave_out_texts(None)
    # One switch for both: the text of a completion, and that of each logprob.
    source = inspect.getsource(RequestState.from_new_request)
    assert "if not sampling_params.detokenize:\n                tokenizer = None" in source


def test_engine_client_has_the_methods_that_a_commit_needs():
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "mode" in parameters(AsyncLLM.pause_generation)
    assert "args" in parameters(AsyncLLM.collective_rpc)
    for name in ("reset_prefix_cache", "resume_generation"):
        assert inspect.iscoroutinefunction(getattr(AsyncLLM, name))


def test_workers_have_the_methods_that_put_adapters_into_slots():
    from vllm.v1.worker.worker_base import WorkerBase

    assert parameters(WorkerBase.add_lora) == ["self", "lora_request"]
    assert parameters(WorkerBase.remove_lora) == ["self", "lora_id"]


def test_api_server_finds_adapters_and_base_names_where_we_write_them():
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    source = inspect.getsource(OpenAIServingModels.__init__)
    for name in ("self.lora_requests", "self.base_model_paths", "self.lora_id_counter"):
        assert name in source


def test_plugin_replaces_the_manager_once(stock_vllm):
    from tink_rl.server.plugin import register
    from tink_rl.server.vllm_names import (
        InputProcessor,
        LRUCacheWorkerLoRAManager,
        lora_model_runner_mixin,
    )

    process = InputProcessor.process_inputs
    register()
    first = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    register()
    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is first
    assert issubclass(first, LRUCacheWorkerLoRAManager) and first.resolves_tink_paths
    assert InputProcessor.process_inputs.checks_ids
    assert InputProcessor.process_inputs.__wrapped__ is process


def test_model_runners_sample_as_their_stand_ins_in_test_full_logprobs():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
    from vllm.v1.worker.gpu.sample.sampler import Sampler as SecondSampler
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
    from vllm.v1.worker.gpu_model_runner import ExecuteModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

    assert parameters(First.sample_tokens) == ["self", "grammar_output"]
    assert parameters(First._sample) == ["self", "logits", "spec_decode_metadata"]
    assert "logits" in ExecuteModelState._fields and not hasattr(Second, "_sample")
    first = inspect.getsource(First.sample_tokens)
    assert first.index("apply_grammar_bitmask(") < first.index("self._sample(")
    assert parameters(SecondSampler.add_request) == ["self", "req_idx", "sampling_params"]
    assert parameters(SecondSampler.__call__) == ["self", "logits", "input_batch"]
    mask = parameters(StructuredOutputsWorker.apply_grammar_bitmask)
    assert mask[:3] == ["self", "logits", "input_batch"]
    second = inspect.getsource(Second.sample)
    assert second.index("structured_outputs_worker.apply_grammar_bitmask(") < second.index(
        "self.sampler(logits, input_batch)"
    )


def test_child_that_only_looks_at_a_model_is_left_alone(stock_vllm, monkeypatch):
    from vllm.model_executor.models import registry

    from tink_rl.server import plugin
    from tink_rl.server.vllm_names import LRUCacheWorkerLoRAManager, lora_model_runner_mixin

    assert registry._SUBPROCESS_COMMAND[-2:] == ["-m", registry.__name__]
    main = SimpleNamespace(__spec__=registry.__spec__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    plugin.register()
    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is LRUCacheWorkerLoRAManager


@pytest.mark.parametrize(
    ("process", "asked", "sleeps"),
    [
        ("EngineCore", "engine", True),
        ("EngineCore_DP0", "all", True),
        ("VllmWorker-0", "engine", False),
        ("VllmWorker-0", "all", True),
        ("MainProcess", "all", False),
        ("EngineCore", "", False),
    ],
)
def test_only_processes_that_were_told_to_wait_asleep(monkeypatch, process, asked, sleeps):
    from tink_rl.server import plugin
    from tink_rl.server.vllm_names import shm_broadcast

    spins, slept = shm_broadcast.sched_yield, []
    monkeypatch.setattr(shm_broadcast, "sched_yield", spins)  # put back at the end
    monkeypatch.setenv("TINK_SERVER_WAITS_ASLEEP", asked)
    monkeypatch.setattr(multiprocessing.current_process(), "name", process)
    monkeypatch.setattr(plugin, "time", SimpleNamespace(sleep=slept.append))
    plugin._wait_asleep()
    assert (shm_broadcast.sched_yield is not spins) == sleeps
    shm_broadcast.sched_yield()
    assert slept == [plugin._PAUSE_S] * sleeps


def test_trl_reads_only_sync_weights_and_generate_of_its_vllm_object():
    source = inspect.getsource(trl.GRPOTrainer)
    used = {
        line.split("self.vllm_generation.")[1].split("(")[0].split(".")[0].strip()
        for line in source.splitlines()
        if "self.vllm_generation." in line
    }
    # llm belongs to colocate, vllm_client to the check that we repeat ourselves.
    assert used <= {"sync_weights", "generate", "llm", "vllm_client"}
    assert "self._last_loaded_step" in source and "self.use_vllm" in source


@pytest.mark.parametrize(("device", "num_modes"), [("cpu", 0), ("meta", 1)])
def test_reload_makes_tensors_on_its_device_and_sets_no_mode_for_the_default(device, num_modes):
    import torch
    from torch.overrides import _get_current_function_mode_stack
    from vllm.config import VllmConfig, get_current_vllm_config

    from tink_rl.server.reloading import reloading

    config = VllmConfig()
    with reloading(config, torch.device(device)):
        assert get_current_vllm_config() is config
        assert torch.empty(1).device.type == device
        assert len(_get_current_function_mode_stack()) == num_modes
    assert torch.empty(1).device.type == "cpu"


def test_prefix_cache_takes_its_connector_along():
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "reset_connector" in parameters(AsyncLLM.reset_prefix_cache)
    assert inspect.iscoroutinefunction(AsyncLLM.reset_encoder_cache)
    scheduler = vllm_sources.function("v1/core/sched/scheduler.py", "reset_connector_cache")
    assert "if self.connector is None" in scheduler and "reset_cache() is False" in scheduler


def test_vllm_takes_this_share_of_a_gpu_unless_told():
    from vllm.config import CacheConfig

    assert CacheConfig().gpu_memory_utilization == 0.92
