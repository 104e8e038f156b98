"""What ends a training in its middle leaves a checkpoint of the steps done, on every rank or not at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tink_rl import errors
from tink_rl.training.generation import PolicyGeneration, SamplingSettings
from tink_rl.training.publishing import leaving_checkpoint
from tink_rl.training.rollouts import RolloutBatch
from tink_rl.transport.payloads import Limits


class Trainer:
    """Saves into a list."""

    def __init__(self, path, step=5):
        self.args = SimpleNamespace(output_dir=str(path))
        self.state, self.model = SimpleNamespace(global_step=step), object()
        self.saved = []

    def _save_checkpoint(self, model, trial):
        self.saved.append(self.state.global_step)


def link(first_step=2, count=1):
    noted = []
    return SimpleNamespace(
        first_step=first_step,
        ranks=SimpleNamespace(count=count),
        save=lambda path, *, published: noted.append((path.name, published)),
        noted=noted,
    )


def run(trainer, link, error):
    with leaving_checkpoint(trainer, link):
        raise error


@pytest.mark.parametrize(
    ("error", "published"),
    [
        (errors.SamplingRefused("too long"), True),
        (errors.ConfigError("no"), False),
        (errors.PublishFailed("gone", phase="commit"), False),
        (errors.EngineUnavailable("died"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_in_mid_run_names_the_checkpoint_that_it_leaves(tmp_path, error, published):
    made, to = Trainer(tmp_path), link()
    with pytest.raises(
        type(error), match=r"step 5 was saved: resume with .*checkpoint-5"
    ) as caught:
        run(made, to, error)
    assert made.saved == [5] and to.noted == [("checkpoint-5", published)]
    assert caught.value.details.items() >= error.details.items() and caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "to"),
    [
        (errors.NonFiniteWeights("NaN"), link()),
        (errors.RankFailed("rank 1"), link()),
        (ValueError("not ours"), link()),
        (errors.SamplingRefused("no step was done"), link(first_step=5)),
        (errors.SamplingRefused("it never began"), link(first_step=None)),
        (errors.SamplingRefused("saved already", checkpoint="checkpoint-5"), link()),
        (errors.SamplingRefused("on this rank alone"), link(count=2)),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_no_checkpoint_of_broken_weights_of_nothing_or_of_one_rank(tmp_path, error, to):
    made = Trainer(tmp_path)
    with pytest.raises(type(error)) as caught:
        run(made, to, error)
    assert caught.value is error and made.saved == []


def test_what_all_ranks_agreed_on_is_saved_by_all(tmp_path):
    made = Trainer(tmp_path)
    with pytest.raises(errors.SamplingRefused, match="checkpoint-5"):
        run(made, link(count=2), errors.SamplingRefused("rank 1's prompt", ranks="all"))
    assert made.saved == [5]


class Refusing:
    """A client that takes no prompt above a length."""

    def limits(self):
        return Limits()

    def generate(self, prompts, *, n, model, **_):
        if max(map(len, prompts)) > 4:
            raise errors.SamplingRefused("prompts[0] has 5 tokens")
        ids = [[1] for _ in prompts for _ in range(n)]
        return {"completion_ids": ids, "logprobs": None, "logprob_token_ids": None}


def test_ranks_agree_once_in_a_batch_whether_it_could_be_sampled():
    told = []
    made = PolicyGeneration(
        [Refusing()],
        SamplingSettings(max_completion_length=8, logprobs=None),
        current=lambda: "policy@3",
        sync=lambda: None,
        recover=lambda: False,
        agree=lambda error: told.append(error),
    )
    with made.rollout(RolloutBatch()):
        made.generate([[1, 2]], None, 1)
        made.generate([[1, 2, 1, 3]], None, 1)  # another turn, which other ranks may not have
    with made.rollout(RolloutBatch()), pytest.raises(errors.SamplingRefused, match="5 tokens"):
        made.generate([[1] * 5], None, 1)
    made.generate([[1, 2]], None, 1)  # outside a batch: this rank alone
    assert [type(error) for error in told] == [type(None), errors.SamplingRefused]
