"""`vllm.general_plugins` entry: lets vLLM's LoRA manager load adapters that were staged in memory, and
its processes share a small machine and use the CPU's tile registers.

vLLM calls `register` in every process it starts, possibly more than once.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
from typing import Any

from tink_rl.errors import ConfigError
from tink_rl.plugin_settings import PluginSettings
from tink_rl.server.base_files import load_only_the_checkpoint
from tink_rl.server.id_guard import look_at_requests

logger = logging.getLogger("tink_rl.server")
_PAUSE_S = 0.0002
"""Between two looks of a waiting process; a step of the smallest model takes 10 ms."""


def register() -> None:
    """Put the subclass that knows `tink://` paths where vLLM's model runner looks for its manager.

    Raises:
        ConfigError: this vLLM has moved a name that is needed.
    """
    from tink_rl.server.amx import ask_for_tiles

    ask_for_tiles()
    if _only_looks_at_a_model() or not _names_are_there():
        return
    _wait_asleep()
    load_only_the_checkpoint()
    look_at_requests()
    from tink_rl.server.vllm_names import LRUCacheWorkerLoRAManager, lora_model_runner_mixin

    current = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    if getattr(current, "resolves_tink_paths", False):
        return
    if current is not LRUCacheWorkerLoRAManager:
        logger.warning("another plugin replaced vLLM's LoRA manager; tink_rl builds on %r", current)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = _with_tink_paths(current)


def _only_looks_at_a_model() -> bool:
    """Whether this is the child in which vLLM imports a model's class to ask what it can do.

    It serves nothing, and our imports would be a quarter of its time. The API server is no such case: the
    engine may be forked from it, and then inherits what was registered there.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) == "vllm.model_executor.models.registry"


def _names_are_there() -> bool:
    """Check the names of vLLM, once per server; False: this is somebody's plain vLLM, which is left alone."""
    from tink_rl.server import vllm_names

    if multiprocessing.parent_process() is not None:  # started by the process that was checked
        return True
    try:
        vllm_names.check()
    except ConfigError as error:
        if PluginSettings.load().token_file:
            raise
        logger.warning("tink_rl does nothing here: %s", error)
        return False
    return True


def _wait_asleep() -> None:
    """Where `placement.who_waits_asleep` says so, wait for the other processes of vLLM asleep.

    vLLM's engine core spins for its workers' answers, and every process for a second after the last
    message: on two cores that took 80 % of the one that API server, Tink worker and a trainer run on, and
    batches of 64 fell apart into batches of 20 because the requests came late.
    """
    asked = PluginSettings.load().waits_asleep
    process = multiprocessing.current_process().name
    is_engine, is_worker = "EngineCore" in process, "Worker" in process
    if not ((is_engine and asked in ("engine", "all")) or (is_worker and asked == "all")):
        return
    from tink_rl.server.vllm_names import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(_PAUSE_S)


def _with_tink_paths(base: Any) -> Any:
    from tink_rl.server import staged_adapters

    class TinkLoRAManager(base):
        """vLLM's manager; only where the tensors of a `tink://` path come from differs, and the head."""

        resolves_tink_paths = True

        def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
            found = super().create_lora_manager(model, vllm_config)
            _leave_head_alone(self._adapter_manager)
            return found

        def _load_adapter(self, lora_request: Any) -> Any:
            if not lora_request.lora_path.startswith(staged_adapters.SCHEME):
                return super()._load_adapter(lora_request)
            return _load_staged(self, lora_request)

    return TinkLoRAManager


def _leave_head_alone(manager: Any) -> None:
    """Compute logits as the base does: no adapter that is served here has LoRA on the head.

    vLLM's wrapper adds LoRA to any rows by the slots of the rows that are *sampled*. One request for
    prompt logprobs, as a probe is, beside another one on an adapter ends the whole engine (0.31.0).
    """
    from tink_rl.server.vllm_names import LogitsProcessorWithLoRA

    for name, module in list(manager.model.named_modules()):
        if isinstance(module, LogitsProcessorWithLoRA):
            parent, _, short = name.rpartition(".")
            setattr(manager.model.get_submodule(parent), short, module.base_layer)
    for name, module in list(manager.modules.items()):
        if isinstance(module, LogitsProcessorWithLoRA):
            del manager.modules[name]
            # So that an adapter with LoRA on the head is refused, not served without it.
            leaf = name.rpartition(".")[2]
            supported = manager.supported_lora_modules
            manager.supported_lora_modules = [n for n in supported if n != leaf]


def _load_staged(manager: Any, lora_request: Any) -> Any:
    """The `LoRAModel` of a staged adapter, validated by vLLM as if it came from a directory."""
    from tink_rl.server import staged_adapters
    from tink_rl.server.vllm_names import LoRAAdapterNotFoundError, LoRAModel, PEFTHelper

    staged = staged_adapters.get(lora_request.lora_path)
    if staged is None:
        raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path)
    rank = staged.header.rank
    modules = sorted({name.split(".")[-3] for name in staged.tensors})
    # alpha = r, because the scaling is already folded into B.
    helper = PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": modules})
    helper.validate_legal(manager.lora_config)
    return LoRAModel.from_lora_tensors(
        lora_model_id=lora_request.lora_int_id,
        tensors={f"base_model.model.{name}": t for name, t in staged.tensors.items()},
        peft_helper=helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None,  # they have vLLM's names already (`names.py`)
    )
