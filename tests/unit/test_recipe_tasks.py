"""Tasks and rewards of the recipes."""

from __future__ import annotations

import re
import shlex

import pytest
from transformers import HfArgumentParser

from recipes.common import RecipeArguments, lora_of
from recipes.tasks import digits, gsm8k, load_task
from recipes.tiny_base import make_tokenizer
from tests.docs.commands import ROOT, blocks


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


def _commands(test):
    """The one command of the quickstart that is marked as run by `test`."""
    [block] = [b for b in blocks() if b.page == "quickstart.md" and b.mark.endswith(f"::{test}")]
    return shlex.split(block.commands[0])


def test_file_of_the_quickstart_is_a_task(tmp_path):
    page = (ROOT / "docs/quickstart.md").read_text()
    [code] = [
        c for c in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "def load(" in c
    ]
    assert len([line for line in code.splitlines() if line]) < 10
    words = _commands("test_file_of_the_quickstart_is_a_task")
    path = tmp_path / words[words.index("--task") + 1]
    path.write_text(code)
    task = load_task(str(path))
    assert task.reward(["12", "11"]) == [1.0, 0.0] and task.train["prompt"][:2] == ["12=", "345="]


def test_file_of_a_task_may_hold_dataclasses(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from recipes.tasks import Task\n"
        "@dataclass\nclass Problem:\n    text: str\n"
        "def load(seed):\n    return Task(train=[Problem('1=')], reward=len)\n"
    )
    assert load_task(str(tmp_path / "mine.py")).train[0].text == "1="


@pytest.mark.parametrize("text", ["", "load = 3", "def load(seed): return seed"])
def test_file_that_gives_no_task_is_refused(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=r"load\(seed\) that returns a Task"):
        load_task(str(tmp_path / "mine.py"))
    with pytest.raises(ValueError, match="no such file"):
        load_task(str(tmp_path / "other.py"))


def test_lora_flags_of_the_quickstart_are_the_adapters():
    words = _commands("test_lora_flags_of_the_quickstart_are_the_adapters")
    given = words[words.index("--lora_r") : words.index("--output_dir")]
    [recipe] = HfArgumentParser(RecipeArguments).parse_args_into_dataclasses(given)
    found = lora_of(recipe)
    assert (found.r, found.lora_alpha) == (8, 16)
    assert found.target_modules == {"q_proj", "v_proj"}
