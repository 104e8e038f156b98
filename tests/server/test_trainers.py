"""RLOO and distillation on a real server, and what the seam refuses before the first step."""

from __future__ import annotations

import pytest
import trl
from transformers import AutoModelForCausalLM, ProcessorMixin

import tink_rl
from tests import tiny_models
from tests.policies import PeftTwin, assert_served
from tests.trainers import config, lora, make_trainer, rows, settings
from tink_rl import errors
from tink_rl.training import checks
from tink_rl.training.rollouts import read_rollouts
from tink_rl.training.trainer import SUPPORTED

pytestmark = [pytest.mark.server, pytest.mark.home]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another model over the same vocabulary."""
    directory = tmp_path_factory.mktemp("teacher") / "qwen3"
    return tiny_models.make_model("qwen3", directory, seed=7)


def assert_each_rollout_came_from_the_version_just_published(trainer):
    history = rows(trainer)
    versions = [record.version for record in trainer.policy_link.records]
    assert len(history) == 4 and len(versions) == 5
    assert [row["rollout/policy_version"] for row in history] == versions[:-1]
    assert all(row["sync/bytes"] > 0 and "sync/phase/stage" in row for row in history)


def assert_served_is_trained(server, model_dir, trainer):
    twin = PeftTwin(model_dir("qwen3"))
    twin.model = trainer.model.eval()
    assert_served(server, trainer.policy_link.current, twin.clear_cases())


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_rloo_samples_every_rollout_from_the_version_just_published(
    server, model_dir, tmp_path, mode
):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        cls=tink_rl.RLOOTrainer,
        config_cls=trl.RLOOConfig,
        sync=settings(server, mode=mode, policy=f"rloo-{mode}"),
    )
    trainer.train()
    assert_each_rollout_came_from_the_version_just_published(trainer)
    # Eight tokens of which each differs by rounding only.
    assert max(row["rollout/sequence_logprob_gap"] for row in rows(trainer)) <= 8e-4
    logged = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert len(logged) == 4 * 16 and all(row["reward"] is not None for row in logged)
    assert_served_is_trained(server, model_dir, trainer)


def test_distilled_student_samples_from_the_version_just_published_and_nears_its_teacher(
    server, model_dir, tmp_path, teacher
):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        cls=tink_rl.DistillationTrainer,
        config_cls=trl.DistillationConfig,
        sync=settings(server, policy="student"),
        extra={"teacher_model": str(teacher)},
        beta=0.5,
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    trainer.train()
    assert_each_rollout_came_from_the_version_just_published(trainer)
    assert rows(trainer)[-1]["loss"] < rows(trainer)[0]["loss"]
    logged = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert len(logged) == 4 * 16 and "reward" not in logged[0]
    assert_served_is_trained(server, model_dir, trainer)


@pytest.mark.parametrize(("plain", "arguments"), [(trl.RLOOTrainer, trl.RLOOConfig)])
def test_attach_gives_another_built_trainer_the_same(server, model_dir, tmp_path, plain, arguments):
    trainer = make_trainer(
        server, model_dir, tmp_path, cls=plain, config_cls=arguments, max_steps=2
    )
    link = tink_rl.attach(trainer, server.url, sync=settings(server, mode="adapter"))
    trainer.train()
    assert len(link.records) == 3
    assert all("rollout/sequence_logprob_gap" in row for row in rows(trainer))


def test_attach_refuses_a_trainer_that_does_not_sample(server, model_dir, tmp_path):
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir("qwen3")),
        args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
        train_dataset=tiny_text(),
        peft_config=lora(),
    )
    with pytest.raises(errors.ConfigError, match="PolicySyncCallback"):
        tink_rl.attach(trainer, server.url, sync=settings(server))


def tiny_text():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["1+1="] * 4, "completion": ["2"] * 4})


class Images(ProcessorMixin):
    def __init__(self):
        """Holds nothing."""


class Built(trl.GRPOTrainer):
    def __init__(self, **attributes):
        self.processing_class = None
        self.__dict__ |= attributes


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"processing_class": Images()}, "without images"),
        ({"vllm_generation": object()}, "already"),
        ({"rollout_func": print}, "environment_factory"),
        ({"use_transformers_continuous_batching": True}, "leave it False"),
    ],
)
def test_what_the_seam_cannot_serve_is_refused_before_the_first_step(attributes, message):
    with pytest.raises(errors.ConfigError, match=message):
        checks.check_trainer(Built(**attributes), SUPPORTED)


@pytest.mark.parametrize("fixed", [{"seed": 3}, {"n": 2}])
def test_fixed_seed_or_number_in_every_request_is_refused(tmp_path, fixed):
    with pytest.raises(errors.ConfigError, match=f"generation_kwargs sets {next(iter(fixed))}"):
        checks.check_arguments(config(tmp_path, generation_kwargs=fixed))
