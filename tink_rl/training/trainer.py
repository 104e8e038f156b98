"""The doors into training: `GRPOTrainer` (change one import) and `attach` (for a built trainer).

TRL builds its vLLM object by class name and offers no injection point, but reads only `sync_weights()`
and `generate(...)` of it. So a trainer is built with `use_vllm=False`, then gets our object and the
four attributes that TRL's own `__init__` would have set (seam of TRL 1.16, held by a contract test).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trl
from transformers import TrainerCallback

from tink_rl.config import SyncConfig
from tink_rl.errors import ConfigError, PublishFailed
from tink_rl.training import checks
from tink_rl.training.generation import PolicyGeneration, SamplingSettings
from tink_rl.training.link import PolicyLink
from tink_rl.training.probe import Prober
from tink_rl.training.run_log import RunLog
from tink_rl.transport.vllm_client import VLLMClient
from tink_rl.types import PublishRecord, ServerStatus

logger = logging.getLogger("tink_rl")


class _PublishCallback(TrainerCallback):
    """Publishes on train begin and right after each optimizer step; closes the link at the end."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._last_step_end = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prove the servers, restore the version number, publish what was loaded."""
        trainer = self._trainer
        if state.global_step:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            trainer.policy_link.restore(checkpoint)
        trainer.vllm_generation.sync_weights()
        trainer._last_loaded_step = state.global_step
        self._last_step_end = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publish the policy that this optimizer step made."""
        _copy_logprob_gap(self._trainer)
        self._publish_or_save(args, state)
        self._trainer._last_loaded_step = state.global_step
        now = time.perf_counter()
        self._trainer._metrics["train"]["step_seconds"].append(now - self._last_step_end)
        self._last_step_end = now

    def _publish_or_save(self, args: Any, state: Any) -> None:
        """A publish that failed twice ends the run, but not before a checkpoint was written."""
        try:
            self._trainer.vllm_generation.sync_weights()
        except PublishFailed as error:
            self._trainer._save_checkpoint(self._trainer.model, trial=None)
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise PublishFailed(
                f"{error.message}; the state of step {state.global_step} was saved: resume with "
                f"--resume_from_checkpoint {checkpoint}",
                **error.details,
            ) from error

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write version and digest beside the checkpoint."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if checkpoint.is_dir():
            self._trainer.policy_link.save(checkpoint)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the lease back; the last version stays served."""
        self._trainer.policy_link.close()


def _copy_logprob_gap(trainer: Any) -> None:
    found = trainer._metrics["train"].get("sampling/sampling_logp_difference/max")
    if found:
        trainer._metrics["train"]["rollout/logprob_gap"].append(found[-1])


def attach(
    trainer: Any,
    servers: str | VLLMClient | list[str | VLLMClient] | None = None,
    *,
    sync: SyncConfig | None = None,
) -> PolicyLink:
    """Let a trainer that was built with `use_vllm=False` sample from vLLM and publish after each step.

    Args:
        trainer: A TRL 1.16 `GRPOTrainer` with a PEFT model.
        servers: URL(s) or client(s); None: `sync.servers`, else TRL's `vllm_server_*` arguments.
        sync: Settings.

    Returns:
        The link, also kept as `trainer.policy_link`.

    Raises:
        ConfigError: an argument under which the run would be wrong.
        UnsupportedAdapter: the adapter cannot be published.
        SecondPublisher: this model is published already.
    """
    checks.check_trl_version(trl.__version__)
    sync = sync or SyncConfig()
    if getattr(trainer, "vllm_generation", None) is not None:
        raise ConfigError(
            "this trainer has a vLLM connection already; build it with use_vllm=False, then attach"
        )
    checks.check_arguments(trainer.args)
    _refuse_transformers_batching(trainer)
    clients = _clients(servers, sync, trainer.args)
    model = trainer.accelerator.unwrap_model(trainer.model)
    link = PolicyLink(
        model,
        trainer.accelerator,
        clients=clients,
        config=sync,
        base_model=model.get_base_model().name_or_path if hasattr(model, "get_base_model") else "",
        prober=Prober(model, vocab_size=model.config.get_text_config().vocab_size),
        rank_timeout_s=float(getattr(trainer.args, "ddp_timeout", 1800)),
    )
    trainer.policy_link = link
    trainer.vllm_generation = _generation(trainer, link, clients)
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
    trainer.add_callback(_PublishCallback(trainer))
    trainer.add_callback(RunLog(trainer))
    return link


def _refuse_transformers_batching(trainer: Any) -> None:
    if getattr(trainer, "use_transformers_continuous_batching", False):
        raise ConfigError(
            "use_transformers_continuous_batching=True: rollouts come from the vLLM server; leave it False"
        )
    if getattr(trainer, "rollout_func", None) is not None:
        raise ConfigError(
            "rollout_func is set: it bypasses the sampled logprobs of the server; leave it None"
        )


def _clients(
    servers: str | VLLMClient | list[str | VLLMClient] | None, sync: SyncConfig, args: Any
) -> list[VLLMClient]:
    given = [servers] if isinstance(servers, (str, VLLMClient)) else list(servers or sync.servers)
    if not given:
        given = [
            args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        ]
    return [
        server
        if isinstance(server, VLLMClient)
        else VLLMClient(
            server,
            token=sync.read_token(),
            api_key=sync.api_key,
            request_timeout_s=sync.request_timeout_s,
            connection_timeout=args.vllm_server_timeout,
        )
        for server in given
    ]


def _generation(trainer: Any, link: PolicyLink, clients: list[VLLMClient]) -> PolicyGeneration:
    args = trainer.args
    settings = SamplingSettings(
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        generation_kwargs=args.generation_kwargs,
    )

    def check(status: ServerStatus) -> None:
        checks.check_sampling(args, status, dropout=link.collector.dropout)

    def sync() -> None:
        link.start(check)
        _log_publish(trainer, link.publish())

    return _MeasuredGeneration(
        clients,
        settings,
        current=lambda: link.current,
        sync=sync,
        recover=link.recover,
        trainer=trainer,
    )


class _MeasuredGeneration(PolicyGeneration):
    """Also appends tokens per second and the sampled version to TRL's metrics."""

    def __init__(self, *args: Any, trainer: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer = trainer

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See `PolicyGeneration.generate`."""
        rows = super().generate(*args, **kwargs)
        metrics = self._trainer._metrics["train" if self._trainer.model.training else "eval"]
        metrics["rollout/tokens_per_second"].append(self.last_num_tokens / self.last_seconds)
        metrics["rollout/seconds"].append(self.last_seconds)
        metrics["rollout/policy_version"].append(float(self.last_model.rpartition("@")[2]))
        return rows


def _log_publish(trainer: Any, record: PublishRecord | None) -> None:
    if record is None or not record.published:
        return
    metrics = trainer._metrics["train"]
    metrics["sync/seconds"].append(record.seconds)
    metrics["sync/held_seconds"].append(record.held_seconds)
    metrics["sync/bytes"].append(float(record.num_bytes))
    metrics["sync/policy_version"].append(float(record.version))
    for phase, seconds in record.phase_seconds.items():
        metrics[f"sync/phase/{phase}"].append(seconds)
    if record.probe_gap is not None:
        metrics["sync/probe_gap"].append(record.probe_gap)


class PolicySyncMixin:
    """Builds a TRL trainer without its own vLLM object and attaches ours."""

    policy_link: PolicyLink

    def __init__(
        self,
        *args: Any,
        sync: SyncConfig | None = None,
        servers: str | VLLMClient | list[str | VLLMClient] | None = None,
        **kwargs: Any,
    ) -> None:
        """TRL's arguments, plus `sync` (settings) and `servers` (else TRL's `vllm_server_*`)."""
        config, position = _find_config(args, kwargs)
        if config is not None:
            checks.check_arguments(config)
            plain = copy.copy(config)
            plain.use_vllm = False
            if position is None:
                kwargs["args"] = plain
            else:
                args = (*args[:position], plain, *args[position + 1 :])
        super().__init__(*args, **kwargs)
        attach(self, servers, sync=sync)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`; gives the lease back also when training fails.

        With several processes, what fails on one fails on all with the same error.
        """
        with self._link_closed_on_error(), self.policy_link.ranks.failing_together():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _link_closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.policy_link.close()
            raise


def _find_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int | None]:
    if "args" in kwargs:
        return kwargs["args"], None
    for position, value in enumerate(args):
        if isinstance(value, trl.GRPOConfig):
            return value, position
    return None, None


class GRPOTrainer(PolicySyncMixin, trl.GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` whose rollouts come from a vLLM server that always holds the current policy.

    Change one import. The arguments are TRL's; `use_vllm` may be True (`vllm_mode="server"`) or left
    out. Additional: `sync=SyncConfig(...)`, `servers=URL(s)`.

    Raises:
        ConfigError, UnsupportedAdapter: before the first step, with the reason and the remedy.
    """
