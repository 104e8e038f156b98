"""The first way into training: TRL's on-policy trainers (change one import), and `attach`.

TRL builds its vLLM object by class name and offers no injection point, but reads only `sync_weights()`
and `generate(...)` of it. So a trainer is built with `use_vllm=False`, then gets our object and the
four attributes that TRL's own `__init__` would have set (`trl_seam` looks whether they are still there).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import transformers
import trl
from accelerate.utils import gather_object
from transformers import TrainingArguments

from tink_rl import placement
from tink_rl.config import SyncConfig
from tink_rl.errors import TinkError, from_wire
from tink_rl.loopback import is_local
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.training import checks, live, metrics, trl_seam
from tink_rl.training.connect import Servers, clients_of, link_to
from tink_rl.training.devices import one_device
from tink_rl.training.generation import PolicyGeneration, SamplingSettings
from tink_rl.training.lookahead import LookAhead
from tink_rl.training.offpolicy import OffPolicyAccount
from tink_rl.training.policy_publisher import PolicyPublisher
from tink_rl.training.prompts import check_prompts
from tink_rl.training.publishing import PublishCallback, metrics_of
from tink_rl.training.ratio import RatioWatch
from tink_rl.training.rollout_log import RolloutLog
from tink_rl.training.run_log import RunLog
from tink_rl.training.scoring import RolloutRecorder
from tink_rl.training.trl_names import Accelerator, Arguments, RolloutTrainer, State
from tink_rl.types import PolicyVersion, ServerStatus

logger = logging.getLogger("tink_rl")
SUPPORTED = (trl.GRPOTrainer, trl.RLOOTrainer, trl.DistillationTrainer)
"""What `attach` takes: the trainers that read their rollouts through the seam."""


class _RolloutCallback(PublishCallback):
    """As its parent; also times the steps and keeps TRL from publishing again on its own."""

    _trainer: RolloutTrainer

    def __init__(
        self, trainer: RolloutTrainer, link: PolicyPublisher, recorder: RolloutRecorder
    ) -> None:
        super().__init__(trainer, link, trainer.vllm_generation.sync_weights)
        self._generation: PolicyGeneration = trainer.vllm_generation
        self._recorder, self._ratio = recorder, RatioWatch()
        self._last_step_end = 0.0

    def on_train_begin(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """See `PublishCallback`."""
        self._recorder.begin_log(state.global_step)
        super().on_train_begin(args, state, control)
        self._trainer._last_loaded_step = state.global_step
        self._last_step_end = time.perf_counter()
        if self._generation.ahead is not None:
            self._generation.ahead.begin(state.global_step)

    def on_step_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """See `PublishCallback`."""
        if self._generation.ahead is None:  # else the account has it, without what age adds
            _copy_logprob_gap(self._trainer)
        if state.is_world_process_zero:
            self._ratio.look(state.global_step, self._trainer._metrics["train"])
        super().on_step_end(args, state, control)
        self._trainer._last_loaded_step = state.global_step
        self._generation.look_ahead()
        now = time.perf_counter()
        found = {"step_seconds": now - self._last_step_end}
        if self._generation.ahead is not None:
            found |= self._generation.ahead.step_metrics()
        metrics.add(self._trainer._metrics["train"], found)
        self._last_step_end = now

    def on_train_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """See `PublishCallback`; `load_best_model_at_end` has put other weights there after the last step."""
        self._sync()
        super().on_train_end(args, state, control)
        # The next evaluation compares first: more may be loaded until then.
        self._trainer._last_loaded_step = -1

    def on_log(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Show a few of the last rollouts as a wandb table, where the run reports there."""
        if self._recorder.shown and state.is_world_process_zero:
            live.log_table(args, state, "rollouts", self._recorder.shown)
            self._recorder.shown = []


def _copy_logprob_gap(trainer: RolloutTrainer) -> None:
    found = trainer._metrics["train"].get("sampling/sampling_logp_difference/max")
    for value in found or ():
        metrics.add(trainer._metrics["train"], {"rollout/logprob_gap": value})


def attach(
    trainer: transformers.Trainer,
    servers: Servers = None,
    *,
    sync: SyncConfig | None = None,
) -> PolicyPublisher:
    """Let a trainer that was built with `use_vllm=False` sample from vLLM and publish after each step.

    Args:
        trainer: A TRL `GRPOTrainer`, `RLOOTrainer` or `DistillationTrainer` with a PEFT model.
        servers: URL(s) or client(s); None: `sync.servers`, else TRL's `vllm_server_*` arguments.
        sync: Settings.

    Returns:
        The link, also kept as `trainer.policy_link`.

    Raises:
        ConfigError: an argument under which the run would be wrong.
        UnsupportedAdapter: the adapter cannot be published.
        SecondPublisher: this model is published already.
        In any case the trainer is as it was, and the model free for another attempt.
    """
    checks.check_trainer(trainer, SUPPORTED)
    trl_seam.check(trainer)
    checks.check_arguments(trainer.args)
    before = dict(vars(trainer))
    try:
        return _attach(trainer, servers, sync or SyncConfig())
    except BaseException:
        link = vars(trainer).get("policy_link")
        if link is not None and link is not before.get("policy_link"):
            link.close()
        vars(trainer).clear()
        vars(trainer).update(before)
        raise


def _attach(trainer: RolloutTrainer, servers: Servers, sync: SyncConfig) -> PolicyPublisher:
    clients = clients_of(servers, sync, trainer.args)
    _place(trainer, clients, sync)
    link = link_to(trainer, clients, sync)
    checks.check_off_policy(trainer.args, sync.max_staleness)
    account = OffPolicyAccount.of(trainer, sync) if sync.max_staleness else None
    trainer.vllm_generation = generation = _generation(trainer, link, clients, account)
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
    log = RolloutLog(
        trainer.args.output_dir,
        trainer.processing_class,
        rank=trainer.accelerator.process_index,
        sampling=generation.settings.as_request(),
    )
    recorder = RolloutRecorder(
        trainer, generation, link, log, account=account, every=sync.rollout_log_every
    )
    recorder.install()
    if sync.max_staleness:
        checks.check_look_ahead(trainer, sync)
        generation.ahead = LookAhead(
            trainer,
            clients,
            max_staleness=sync.max_staleness,
            new_batch=recorder.new_batch,
            clock=generation.clock,
        )
    trainer.add_callback(_RolloutCallback(trainer, link, recorder))
    trainer.add_callback(RunLog(trainer))
    trainer.evaluate = _releasing_lease(trainer, link)
    return link


def _place(trainer: RolloutTrainer, clients: list[VLLMClient], sync: SyncConfig) -> None:
    """Who computes where, where a server is on this machine; said by one rank."""
    if any(is_local(client.base_url) for client in clients):
        line = placement.place_trainer(max_staleness=sync.max_staleness)
        if line and trainer.accelerator.is_main_process:
            logger.info("%s", line)


def _releasing_lease(trainer: RolloutTrainer, link: PolicyPublisher) -> Callable[..., Any]:
    """`trainer.evaluate`, which outside of training looks at the base first and gives the lease back."""
    evaluate = trainer.evaluate

    @wraps(evaluate)
    def releasing(*args: object, **kwargs: object) -> Any:
        if link.is_training:
            return evaluate(*args, **kwargs)
        link.expect_other_base()
        trainer._last_loaded_step = -1
        try:
            return evaluate(*args, **kwargs)
        finally:
            link.sync.close()  # what a training watches over is not begun yet, or has ended

    return releasing


def _generation(
    trainer: RolloutTrainer,
    link: PolicyPublisher,
    clients: list[VLLMClient],
    account: OffPolicyAccount | None,
) -> PolicyGeneration:
    args = trainer.args
    settings = SamplingSettings.of(args)

    def check(status: ServerStatus) -> None:
        checks.check_sampling(args, status, dropout=link.collector.dropout, clients=clients)
        check_prompts(trainer, status, settings.fields()["max_tokens"])

    def sync() -> None:
        link.start(check)
        generation.settle_rows(link.replaces_in_place)
        metrics.add(trainer._metrics["train"], metrics_of(link.publish(), link))
        if account is not None:
            account.remember(link.current)

    generation = _MeasuredGeneration(
        clients,
        settings,
        trainer,
        current=lambda: link.current,
        sync=sync,
        recover=link.recover,
        pin=link.pin,
        agree=partial(_agree, trainer.accelerator),
    )
    return generation


def _agree(accelerator: Accelerator, error: TinkError | None) -> None:
    """Raise on every rank what any of them could not sample, so that all can leave a checkpoint."""
    if accelerator.num_processes > 1:
        found = gather_object([None if error is None else [error.to_wire(), error.status]])
        first = next((wire for wire in found if wire is not None), None)
        if first is not None:
            error = error or from_wire(*first)
            error.details["ranks"] = "all"
    if error is not None:
        raise error


class _MeasuredGeneration(PolicyGeneration):
    """Also appends tokens per second and the sampled version to TRL's metrics."""

    def __init__(
        self,
        clients: list[VLLMClient],
        settings: SamplingSettings,
        trainer: RolloutTrainer,
        **needed: Any,
    ) -> None:
        super().__init__(clients, settings, **needed)
        self._trainer = trainer

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> Any:
        """See `PolicyGeneration.generate`."""
        rows = super().generate(prompts, images, num_generations, profiler)
        found = {
            "rollout/tokens_per_second": self.last_num_tokens / self.last_sampled_seconds,
            "rollout/seconds": self.last_seconds,
            "rollout/policy_version": float(PolicyVersion.parse(self.last_model).version),
        }
        phase = "train" if self._trainer.model.training else "eval"
        metrics.add(self._trainer._metrics[phase], found)
        return rows


class PolicySyncMixin:
    """Builds a TRL trainer without its own vLLM object and attaches ours."""

    policy_link: PolicyPublisher

    def __init__(
        self,
        *args: Any,
        sync: SyncConfig | None = None,
        servers: Servers = None,
        **kwargs: Any,
    ) -> None:
        """TRL's arguments, plus `sync` (settings) and `servers` (else TRL's `vllm_server_*`)."""
        config, position = _find_config(args, kwargs)
        if config is not None:
            checks.check_arguments(config)
            plain = copy.copy(config)
            plain.use_vllm = False
            _keep_together(plain, kwargs.get("model", args[0] if args else None))
            if position is None:
                kwargs["args"] = plain
            else:
                args = (*args[:position], plain, *args[position + 1 :])
        super().__init__(*args, **kwargs)
        attach(self, servers, sync=sync)


def _keep_together(config: Arguments, model: object) -> None:
    """Let TRL load bases by name (the policy's, a teacher's) onto this process's GPU alone."""
    if isinstance(model, str) and (placed := one_device(config)):
        config.model_init_kwargs = {**placed, **(config.model_init_kwargs or {})}
        if hasattr(config, "teacher_model_init_kwargs"):
            config.teacher_model_init_kwargs = {
                **placed,
                **(config.teacher_model_init_kwargs or {}),
            }


def _find_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int | None]:
    if "args" in kwargs:
        return kwargs["args"], None
    for position, value in enumerate(args):
        if isinstance(value, TrainingArguments):
            return value, position
    return None, None


class GRPOTrainer(PolicySyncMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose rollouts come from a vLLM server that always holds the current policy.

    Change one import. The arguments are TRL's; `use_vllm` may be True (`vllm_mode="server"`) or left
    out. Additional: `sync=SyncConfig(...)`, `servers=URL(s)`.

    Raises:
        ConfigError, UnsupportedAdapter: before the first step, with the reason and the remedy.
    """


class RLOOTrainer(PolicySyncMixin, trl.RLOOTrainer):
    """`trl.RLOOTrainer`, as `GRPOTrainer` here.

    TRL's RLOO takes no logprobs from the sampler, so there is no importance ratio to correct; the
    largest difference of a sequence's logprob is logged as `rollout/sequence_logprob_gap`.

    Raises:
        ConfigError, UnsupportedAdapter: before the first step, with the reason and the remedy.
    """


class DistillationTrainer(PolicySyncMixin, trl.DistillationTrainer):
    """`trl.DistillationTrainer`: the student samples from the vLLM server, the teacher scores here.

    Raises:
        ConfigError, UnsupportedAdapter: before the first step, with the reason and the remedy.
    """
