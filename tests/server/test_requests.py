"""What is sent to a real server: ids, lengths, fields, numbers of prompts; and what training does of it."""

from __future__ import annotations

import httpx
import pytest
from datasets import Dataset

import tink_rl
from tests.trainers import make_trainer, rows, settings
from tink_rl import errors
from tink_rl.training import trainer as trainer_module

pytestmark = [pytest.mark.server, pytest.mark.home]
TOO_LONG = "1" * 249
"""With 8 tokens of completion one more than the server's 256."""


@pytest.mark.parametrize(
    "prompt", [[64], [[1], [5, 64]], [[65]], [[100000]]], ids=lambda prompt: str(prompt)
)
def test_id_beyond_the_embedding_ends_no_server_whoever_sends_it(server, prompt):
    with server.client() as client:
        name = client.models()[0]
        with pytest.raises(
            errors.SamplingRefused, match=r"the served vocabulary has token ids .* 63"
        ):
            client.generate(prompt, model=name)
        body = {"model": name, "prompt": prompt, "max_tokens": 1}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False)
        assert answer.status_code == 400 and "token id" in answer.text.lower()
        assert client.generate([[63]], model=name, max_tokens=1)["completion_ids"]


def test_client_without_a_token_knows_the_limits_too(server):
    with tink_rl.VLLMClient(server.url) as client:
        limits = client.limits()
        assert (limits.vocab_size, limits.max_model_len) == (64, 256)
        with pytest.raises(errors.SamplingRefused, match=r"prompts\[0\] has 249 tokens.*takes 256"):
            client.generate([[5] * 249], max_tokens=8)
        assert client.generate([[5] * 248], max_tokens=8)["completion_ids"]


def test_more_prompts_than_vllm_takes_at_once_are_answered_in_order(server):
    prompts = [[3 + i % 60, 3 + i // 60] for i in range(1500)]
    ask = {"max_tokens": 2, "generation_kwargs": {"seed": 5}}
    with server.client() as client:
        found = client.generate(prompts, **ask)
        few = client.generate(prompts[1020:1030], **ask)
    assert found["prompt_ids"] == prompts
    assert found["completion_ids"][1020:1030] == few["completion_ids"]


def test_text_that_is_none_is_refused_and_odd_text_is_answered(server):
    with server.client() as client:
        with pytest.raises(errors.SamplingRefused, match="half a surrogate pair"):
            client.generate(["12=\ud83d"])
        assert client.generate(["\U0001f600", "\x00", " "], max_tokens=1)["completion_ids"]


def test_sampled_tokens_logprob_comes_first_of_several(server):
    ask = {"max_tokens": 8, "generation_kwargs": {"seed": 3}}
    with server.client() as client:
        one = client.generate([[5, 6, 7]], n=4, **ask)
        several = client.generate([[5, 6, 7]], n=4, logprobs=3, **ask)
    assert several["completion_ids"] == one["completion_ids"]
    for ids, rows_ in zip(several["completion_ids"], several["logprob_token_ids"], strict=True):
        assert [row[0] for row in rows_] == ids
    firsts = [row[0] for rows_ in several["logprobs"] for row in rows_]
    alone = [row[0] for rows_ in one["logprobs"] for row in rows_]
    assert firsts == pytest.approx(alone, abs=1e-5)


def test_honoured_fields_leave_the_ratio_at_one(server, model_dir, tmp_path):
    given = {"logprobs": 3, "stop_token_ids": [20], "ignore_eos": True, "prompt_logprobs": 0}
    trainer = make_trainer(
        server, model_dir, tmp_path, sync=settings(server), max_steps=2, generation_kwargs=given
    )
    trainer.train()
    for row in rows(trainer):
        assert row["rollout/logprob_gap"] <= 1e-4
        assert row["sampling/importance_sampling_ratio/mean"] > 0.99


def test_row_that_cannot_fit_is_named_before_the_first_step(server, model_dir, tmp_path):
    trainer = make_trainer(server, model_dir, tmp_path, sync=settings(server))
    trainer.train_dataset = Dataset.from_dict({"prompt": ["1+1="] * 40 + [TOO_LONG]})
    with pytest.raises(errors.ConfigError, match=r"train_dataset\[40\]: its prompt has 249 tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_refusal_in_mid_run_leaves_a_checkpoint_to_resume_from(
    server, model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer_module, "check_prompts", lambda *_: None)
    make = {"sync": settings(server), "shuffle_dataset": False}
    trainer = make_trainer(server, model_dir, tmp_path, **make)
    good = ["1+1=", "2+2=", "3+3=", "4+4="] * 2
    trainer.train_dataset = Dataset.from_dict({"prompt": [*good, TOO_LONG, *good]})
    with pytest.raises(errors.SamplingRefused, match=r"249 tokens.*step 2 was saved.*checkpoint-2"):
        trainer.train()
    again = make_trainer(server, model_dir, tmp_path, **make)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert max(row["rollout/logprob_gap"] for row in rows(again)) <= 1e-4
