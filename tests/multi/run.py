"""One process of a small GRPO run; `accelerate launch` starts it once per rank. See test_processes.py.

`run.py JOB.json`: the job names the server, the model, where to write and what to let fail.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainerCallback, set_seed
from trl import GRPOConfig

import tink_rl
from tests.multi import fsdp_on_cpu, planted, zero3_on_cpu
from tink_rl import SyncConfig, errors
from tink_rl.publish.packets import PacketTransfer

PROMPTS = Dataset.from_dict({"prompt": [f"{i}+{j}=" for i in range(8) for j in range(8)]})


class Snapshot(TrainerCallback):
    """Collects the adapter after the first publish, on every rank, as a publish does."""

    def __init__(self, job, rank):
        self.job, self.rank = job, rank
        self.trainer = None
        self.sharding = None

    def on_train_begin(self, args, state, control, **_):
        self.save("first")

    def on_step_end(self, args, state, control, **_):
        self.save("last")
        if state.global_step == self.job.get("kill_after_step"):
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self, name):
        self.sharding = self.trainer.policy_link.collector.sharding().value
        adapter = self.trainer.policy_link.collector.collect()
        if self.rank == 0:
            save_file(
                {k: v.contiguous() for k, v in adapter.tensors.items()},
                f"{self.job['out']}/{name}.safetensors",
            )


def let_fail(trainer, job, rank):
    """The failure that the job asks for."""
    link, fail = trainer.policy_link, job.get("fail")
    if fail == "collect on rank 1" and rank == 1:
        collect = link.collector.collect

        def broken(*args, **kwargs):
            if trainer.state.global_step == 2:
                raise MemoryError("no memory to gather the adapter")
            return collect(*args, **kwargs)

        link.collector.collect = broken
    if fail == "publish on rank 0" and rank == 0:
        stage = PacketTransfer.stage

        def lost(transfer):
            if trainer.state.global_step == 2:
                raise errors.ChannelLost("injected", replica=job["server"])
            stage(transfer)

        PacketTransfer.stage = lost
    if fail == "version on the server":
        trainer.add_callback(LoseVersion(trainer, rank))


class LoseVersion(TrainerCallback):
    """Before the third step's rollouts the server loses what it served, as in a restart."""

    def __init__(self, trainer, rank):
        self.trainer, self.rank = trainer, rank

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            link = self.trainer.policy_link
            if self.rank == 0:
                link.sync.fleet.replicas[0].drop(link.current)
            self.trainer.accelerator.wait_for_everyone()


def reward(job, rank, trainer_of):
    def noise(completions, **_):
        """Varies between any two completions, so that every step changes the policy."""
        if (
            job.get("fail") == "reward on rank 1"
            and rank == 1
            and trainer_of().state.global_step == 2
        ):
            raise ValueError("no reward for this one")
        if job.get("fail") == "slow rank 1" and rank == 1:
            time.sleep(0.5)
        return [float(sum(map(ord, text)) % 7) for text in completions]

    return noise


def build(job, rank):
    snapshot = Snapshot(job, rank)
    set_seed(7)
    trainer = tink_rl.GRPOTrainer(
        model=job["model"],
        reward_funcs=reward(job, rank, lambda: snapshot.trainer),
        args=GRPOConfig(
            output_dir=job["out"],
            use_cpu=True,
            bf16=False,
            num_generations=4,
            max_completion_length=8,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            beta=0.0,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            ddp_timeout=120,
            model_init_kwargs={"dtype": "float32"},
            **{"save_strategy": "no", "seed": 7, **job["args"]},
        ),
        train_dataset=PROMPTS,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False
        ),
        servers=job["server"],
        sync=SyncConfig(
            **{
                "token": job["token"],
                "policy": job["policy"],
                "probe_every": 2,
                **job.get("sync", {}),
            }
        ),
    )
    snapshot.trainer = trainer
    trainer.add_callback(snapshot)
    return trainer, snapshot


def facts(trainer, snapshot):
    link, history = trainer.policy_link, trainer.state.log_history
    return {
        "sharding": snapshot.sharding,
        "current": link.current,
        "records": [[r.version, r.digest, r.num_bytes] for r in link.records],
        "published_here": link.sync.current is not None,
        "sampled_tokens": trainer.vllm_generation.last_num_tokens,
        "sampled_from": trainer.vllm_generation.last_model,
        "history": [row for row in history if "reward" in row],
    }


def main(job):
    from accelerate import PartialState

    fsdp_on_cpu.enable()
    zero3_on_cpu.leave_kernel_uncompiled()
    rank = PartialState(cpu=True).process_index
    found = {}
    try:
        trainer, snapshot = build(job, rank)
        let_fail(trainer, job, rank)
        trainer.train(resume_from_checkpoint=job.get("resume"))
        found = facts(trainer, snapshot)
        if "moe" in job:
            found["planted"] = planted.outcomes(trainer, job)
    except BaseException as error:
        found = {"error": type(error).__name__, "message": str(error)}
        raise
    finally:
        (Path(job["out"]) / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
