"""Tasks and rewards of the recipes."""

from __future__ import annotations

import pytest

from recipes.tasks import digits, gsm8k, load_task
from recipes.tiny_base import make_tokenizer


def test_held_out_problems_are_never_trained_on():
    train, heldout = digits.problems()
    assert len(heldout) == 1000 and not set(train) & set(heldout)
    first, second = load_task("digits", seed=0), load_task("digits", seed=1)
    assert first.train["prompt"] != second.train["prompt"]
    assert first.heldout["prompt"] == second.heldout["prompt"]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("1347", 1.0), ("1374", 0.0), ("13475", 0.0), ("", 0.0), ("1347=", 0.0), ("134", 0.0)],
)
def test_only_the_exact_answer_is_rewarded(completion, reward):
    assert digits.exact_answer([completion], ["1347"]) == [reward]


def test_tokenizer_round_trips_prompts_one_token_a_character():
    tokenizer = make_tokenizer()
    ids = tokenizer("4173=")["input_ids"]
    assert len(ids) == 5 and tokenizer.decode(ids) == "4173="
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "4173="


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 12.\n#### 1,200", "1200"),
        ("#### $3.50", "3.5"),
        (r"thus \boxed{-7} or 9", "-7"),
        ("first 3 then 4", "4"),
        ("no number at all", None),
        ("#### none", None),
        ("10", "10"),
    ],
)
def test_final_number_is_found(text, number):
    assert gsm8k.final_number(text) == number


def test_gsm8k_sample_loads_through_datasets_and_rewards_its_own_answers():
    task = load_task("gsm8k", data_path=str(gsm8k.SAMPLE))
    assert len(task.train) == 8 and task.train[0]["prompt"][0]["role"] == "user"
    answers = task.train["answer"]
    right = [[{"role": "assistant", "content": f"#### {answer}"}] for answer in answers]
    assert task.reward(completions=right, answer=answers) == [1.0] * 8
    assert task.reward(completions=["I do not know"], answer=["3"]) == [0.0]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="digits, gsm8k"):
        load_task("chess")
    with pytest.raises(FileNotFoundError, match="expected JSONL"):
        load_task("gsm8k", data_path="nowhere.jsonl")
