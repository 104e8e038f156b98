"""The second way into training: any Hugging Face `Trainer` publishes its adapter, for live sampling.

trainer = trl.SFTTrainer(...)                      # or DPOTrainer, transformers.Trainer, ...
trainer.add_callback(tink_rl.PolicySyncCallback(trainer, "http://127.0.0.1:8000",
                                                sample_prompts=["4173="]))
trainer.train()                                    # `policy@N` is served after each step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from tink_rl.config import SyncConfig
from tink_rl.errors import ConfigError, UnknownVersion
from tink_rl.training import live, metrics
from tink_rl.training.connect import Servers, clients_of, link_to
from tink_rl.training.publishing import PublishCallback, metrics_of
from tink_rl.training.trl_names import Arguments, State
from tink_rl.types import PolicyVersion, ServerStatus

Prompt = str | list[dict[str, Any]]
"""Text, or the messages of a conversation."""


class PolicySyncCallback(PublishCallback):
    """Publishes a trainer's LoRA on train begin, after every k-th step and at the end.

    The publishes' `sync/*` metrics go into the trainer's own log. With `sample_prompts`, completions of
    the policy just published are shown in the console, and in wandb if the trainer reports there.
    """

    def __init__(
        self,
        trainer: transformers.Trainer,
        servers: Servers = None,
        *,
        sync: SyncConfig | None = None,
        every: int = 1,
        sample_prompts: Sequence[Prompt] = (),
        sample_every: int = 10,
        max_tokens: int = 64,
        temperature: float = 0.0,
    ) -> None:
        """Find the adapter; speaks to no server before training begins.

        Args:
            trainer: A built trainer with a PEFT model; add the callback to it afterwards.
            servers: URL(s) or client(s); None: `sync.servers`, else port 8000 here.
            sync: Settings.
            every: Publish after every k-th optimizer step.
            sample_prompts: Prompts whose completions are shown.
            sample_every: Show them after every k-th step, and at begin and end.
            max_tokens: Length of what is shown.
            temperature: 0 is greedy.

        Raises:
            ConfigError: a setting is out of range, or the trainer samples from vLLM by itself.
            UnsupportedAdapter: the adapter cannot be published.
            SecondPublisher: this model is published already.
        """
        if every < 1 or sample_every < 1 or max_tokens < 1:
            raise ConfigError(
                f"PolicySyncCallback(every={every}, sample_every={sample_every}, "
                f"max_tokens={max_tokens}): expected at least 1 each"
            )
        if sample_prompts and trainer.processing_class is None:
            raise ConfigError(
                "sample_prompts are given, but the trainer has no tokenizer; build it with "
                "processing_class=AutoTokenizer.from_pretrained(...)"
            )
        sync = sync or SyncConfig()
        if sync.max_staleness:
            raise ConfigError(
                f"PolicySyncCallback with SyncConfig.max_staleness={sync.max_staleness}: this trainer does "
                "not train on what is sampled, so nothing is sampled ahead; leave it at 0"
            )
        self._clients = clients_of(servers, sync, trainer.args)
        super().__init__(trainer, link_to(trainer, self._clients, sync), self._publish, every=every)
        self._prompts, self._sample_every = list(sample_prompts), sample_every
        self._max_tokens, self._temperature = max_tokens, temperature
        self._pending: dict[str, list[float]] = {}
        self.samples: list[dict[str, Any]] = []
        """Everything that was shown: `step`, `policy`, `version`, `prompt`, `completion`."""
        self._log = trainer.log
        trainer.log = self._log_with_metrics

    # -- publish ----------------------------------------------------------------------------------

    def _publish(self) -> None:
        self._link.start(self._check)
        metrics.add(self._pending, metrics_of(self._link.publish(), self._link))

    def _check(self, status: ServerStatus) -> None:
        if self._prompts and self._max_tokens >= status.max_model_len:
            raise ConfigError(
                f"max_tokens={self._max_tokens}: the server takes {status.max_model_len} tokens for "
                "prompt and completion; restart it with a larger --max-model-len"
            )

    def _log_with_metrics(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """`trainer.log` with what the publishes since the last row of training took."""
        if "loss" in logs:
            logs.update({key: sum(found) / len(found) for key, found in self._pending.items()})
            self._pending = {}
        self._log(logs, *args, **kwargs)

    # -- events -----------------------------------------------------------------------------------

    def on_train_begin(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Prove the servers, publish what was loaded, show samples of it."""
        super().on_train_begin(args, state, control)
        self._show(args, state)

    def on_step_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Publish; show samples when it is time."""
        super().on_step_end(args, state, control)
        if state.global_step % self._sample_every == 0:
            self._show(args, state)

    def on_train_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Publish what training ended with, show it, give the lease back; it stays served."""
        self._sync()
        self._show(args, state)
        super().on_train_end(args, state, control)

    # -- look -------------------------------------------------------------------------------------

    def _show(self, args: Arguments, state: State) -> None:
        shown_already = self.samples and self.samples[-1]["step"] == state.global_step
        if not self._prompts or shown_already or not state.is_world_process_zero:
            return
        rows = self._sample(state.global_step)
        self.samples += rows
        live.print_table(f"step {state.global_step}, {self._link.current}", rows)
        live.log_table(args, state, "samples", rows)

    def _generate(self, name: str) -> dict[str, Any]:
        return self._clients[0].generate(
            [self._ids_of(prompt) for prompt in self._prompts],
            model=name,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            logprobs=None,
        )

    def _sample(self, step: int) -> list[dict[str, Any]]:
        name = self._link.current
        try:
            output = self._generate(name)
        except UnknownVersion:  # a restarted server holds nothing
            if not self._link.recover():
                raise
            output = self._generate(name)
        sampled = PolicyVersion.parse(name)
        texts = self._tokenizer.batch_decode(output["completion_ids"], skip_special_tokens=True)
        return [
            {
                "step": step,
                "policy": sampled.policy,
                "version": sampled.version,
                "prompt": prompt if isinstance(prompt, str) else str(prompt[-1]["content"]),
                "completion": text,
            }
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]

    @property
    def _tokenizer(self) -> Any:
        found = self._trainer.processing_class
        return getattr(found, "tokenizer", found)  # a processor holds one

    def _ids_of(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        ids = self._tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        return list(ids)
