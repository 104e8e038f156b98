"""Narrowed sampling on a real server: logprobs over the whole vocabulary, and runs that learn."""

from __future__ import annotations

import logging

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM

import tink_rl
from benchmarks import grpo_run
from tests.trainers import PROMPTS, make_trainer, rows, settings
from tink_rl.training.ratio import LOWEST_RATIO, RATIO
from tink_rl.training.rollouts import read_rollouts

pytestmark = [pytest.mark.server, pytest.mark.home]

NARROWED = [
    {"top_k": 3, "temperature": 0.7},
    {"top_p": 0.5},
    {"top_k": 3, "logprobs": 3},
    {"min_p": 0.2, "temperature": 1.3},
    {"repetition_penalty": 1.5},
    {"structured_outputs_regex": "[a-d]{2}"},
    *(
        {"generation_kwargs": extra}
        for extra in (
            {"logit_bias": {"5": 20}},
            {"min_tokens": 8},
            {"bad_words": ["1"]},
            {"allowed_token_ids": [3, 4, 5]},
            {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        )
    ),
]
PROMPT_IDS = [[5, 6, 7], [9, 3, 2, 4]]


@pytest.fixture(scope="module")
def base(model_dir):
    """The base, as transformers computes it."""
    return AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()


@torch.no_grad()
def whole_logprobs(base, prompt_ids, completion_ids, temperature):
    logits_TV = base(torch.tensor([prompt_ids + completion_ids])).logits[0] / temperature
    targets_T1 = torch.tensor(completion_ids)[:, None]
    logprobs_TV = logits_TV[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logprobs_TV.gather(-1, targets_T1)[:, 0].tolist()


def largest_gap(base, output, temperature):
    return max(
        abs(ours - theirs[0])
        for i, (ids, logprobs) in enumerate(
            zip(output["completion_ids"], output["logprobs"], strict=True)
        )
        for ours, theirs in zip(
            whole_logprobs(base, PROMPT_IDS[i // 4], ids, temperature), logprobs, strict=True
        )
    )


@pytest.mark.parametrize("changes", NARROWED, ids=str)
def test_logprobs_are_those_of_the_whole_vocabulary_for_who_asks_only(server, base, changes):
    options = {"temperature": 1.0, "max_tokens": 8, "n": 4, **changes}
    options["generation_kwargs"] = {"seed": 3, **changes.get("generation_kwargs", {})}
    with server.client() as client:
        asked = client.generate(PROMPT_IDS, full_logprobs=True, **options)
        stock = client.generate(PROMPT_IDS, **options)
    assert asked["completion_ids"] == stock["completion_ids"]
    assert largest_gap(base, asked, options["temperature"]) < 1e-4
    assert largest_gap(base, stock, options["temperature"]) > 0.01


def run(server, model_dir, path, **changes):
    """A run of three steps; its trainer, and how far each adapter tensor moved."""
    sync = settings(server, mode="adapter", policy=path.name)
    trainer = make_trainer(server, model_dir, path, sync=sync, **{"max_steps": 3, **changes})
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return trainer, {
        name: (after[name] - value).abs().max().item() for name, value in before.items()
    }


def assert_learned(trainer, moved, caplog):
    # With num_iterations=2, every other step samples.
    sampled = [row for row in rows(trainer) if RATIO in row]
    kinds = [f"sampling/importance_sampling_ratio/{kind}" for kind in ("min", "mean", "max")]
    assert len(sampled) >= 2
    assert all(row[kind] == pytest.approx(1, abs=1e-3) for row in sampled for kind in kinds)
    assert max(row["rollout/logprob_gap"] for row in sampled) < 1e-4
    # A gradient of denormal numbers would move Adam's parameters by far less than the learning rate.
    assert min(moved.values()) > 1e-3
    assert not [text for text in caplog.messages if "next to nothing is learned" in text]


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 10, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "temperature": 0.6},
        {
            "generation_kwargs": {
                "top_k": 50,
                "logit_bias": {"5": 20},
                "min_tokens": 8,
                "bad_words": ["1"],
            },
            "vllm_importance_sampling_mode": "token_truncate",
            "off_policy_mask_threshold": 0.1,
        },
        {
            "vllm_structured_outputs_regex": "[a-d]{4}",
            "loss_type": "vespo",
            "vllm_importance_sampling_mode": "token_mask",
            "num_iterations": 2,
            "max_steps": 4,
        },
    ],
    ids=["arguments", "generation_kwargs", "regex"],
)
def test_narrowed_run_learns_as_another_does(server, model_dir, tmp_path, caplog, changes):
    caplog.set_level(logging.INFO, "tink_rl")
    trainer, moved = run(server, model_dir, tmp_path, **changes)
    assert_learned(trainer, moved, caplog)
    assert any("over the whole vocabulary" in text for text in caplog.messages)
    for row in read_rollouts(tmp_path / "rollouts.jsonl"):
        assert row["sampling"]["full_logprobs"] is True


def test_narrowed_evaluation_and_rloo_compare_like_with_like(server, model_dir, tmp_path):
    trainer, moved = run(
        server,
        model_dir,
        tmp_path,
        cls=tink_rl.RLOOTrainer,
        config_cls=trl.RLOOConfig,
        extra={"eval_dataset": PROMPTS.select(range(8))},
        top_k=10,
        temperature=0.8,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
    )
    gaps = [
        value
        for row in trainer.state.log_history
        for name, value in row.items()
        if name.endswith("rollout/sequence_logprob_gap")
    ]
    assert len(gaps) >= 4 and max(gaps) < 1e-3 and min(moved.values()) > 1e-3


def test_completions_that_ignore_the_end_token_are_long_and_leave_the_ratio_alone(
    server, model_dir, tmp_path, caplog
):
    trainer, moved = run(server, model_dir, tmp_path, generation_kwargs={"ignore_eos": True})
    assert_learned(trainer, moved, caplog)
    grpo_run.check_learns(rows(trainer))  # as the benchmark does
    for row in read_rollouts(tmp_path / "rollouts.jsonl"):
        assert len(row["turns"][0]["completion_ids"]) == 8
        assert "full_logprobs" not in row["sampling"]


def test_run_whose_ratio_vanishes_says_so(server, model_dir, tmp_path, caplog, monkeypatch):
    # As a stock server answers: renormalised over what the grammar left.
    monkeypatch.setattr("tink_rl.training.generation.distribution_changes", lambda fields: ())
    trainer, _ = run(server, model_dir, tmp_path, vllm_structured_outputs_regex="[a-d]{8}")
    assert all(row[RATIO] < LOWEST_RATIO for row in rows(trainer))
    (line,) = [text for text in caplog.messages if "next to nothing is learned" in text]
    assert line.startswith("step 1: mean importance ratio")
    with pytest.raises(SystemExit, match="3 of 3 steps"):
        grpo_run.check_learns(rows(trainer))
