"""What is found before the first step: arguments that cannot be sent, prompts that cannot be sampled."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from trl import GRPOConfig

from tests.tiny_models import make_tokenizer
from tink_rl.errors import ConfigError
from tink_rl.training import checks, prompts
from tink_rl.training.generation import SamplingSettings

STATUS = SimpleNamespace(
    max_model_len=96,
    vocab_size=64,
    logprobs_mode="processed_logprobs",
    max_prompts=1024,
    no_full_logprobs=None,
)


def arguments(**changes):
    values = {"use_cpu": True, "bf16": False, "report_to": [], "max_completion_length": 16}
    return GRPOConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 3, "every step would sample alike"),
        ("n", 2, "num_generations"),
        ("temperature", 0.5, "scores with temperature=1.0"),
        ("max_tokens", 17, "exceeds max_completion_length=16"),
        ("max_new_tokens", 3, "vLLM's is max_tokens"),
        ("num_beams", 4, "without beams"),
        ("no_such_parameter", 1, "no field"),
        ("echo", True, "as if it had been sampled"),
        ("stream", True, "answers come whole"),
        ("truncate_prompt_tokens", 2, "shorten the prompts"),
        ("model", "other", "is refused"),
        ("return_token_ids", False, "always come back"),
        ("chat_template", "{{ x }}", "stopped by a template"),
        ("top_p", 1.5, "a number above 0 and up to 1"),
        ("min_tokens", 17, "exceeds max_tokens=16"),
        ("stop", [""], "none of them empty"),
        ("logit_bias", {"x": 1.0}, "logit_bias holds 'x'"),
        ("max_tokens", "5", "a whole number"),
        ("structured_outputs", {"regex": object()}, "cannot be sent as JSON"),
    ],
)
def test_entry_of_generation_kwargs_is_refused_by_name(name, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        checks.check_arguments(arguments(generation_kwargs={name: value}))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        *({"logprobs": 3}, {"stop": ["x"]}, {"stop_token_ids": [5]}, {"ignore_eos": True}),
        *({"max_tokens": 4}, {"temperature": 1.0}, {"prompt_logprobs": 0}, {"echo": False}),
        *({"skip_special_tokens": False}, {"repetition_detection": {"max_pattern_size": 4}}),
        *({"seed": None, "max_new_tokens": None}, {"top_k": 5}, {"min_tokens": 16}, None),
    ],
    ids=str,
)
def test_entry_that_can_be_honoured_passes(given):
    checks.check_arguments(arguments(generation_kwargs=given))


def test_generation_kwargs_that_are_no_dict_are_refused():
    with pytest.raises(ConfigError, match="expected a dict"):
        checks.check_generation_kwargs(SimpleNamespace(generation_kwargs=[("top_k", 5)]))


def test_numbers_of_numpy_are_settings_and_can_be_logged():
    given = {"top_k": np.int64(5), "logit_bias": {np.int64(7): np.float32(2)}}
    args = arguments(temperature=np.float64(0.7), generation_kwargs=given)
    checks.check_arguments(args)
    assert json.loads(json.dumps(SamplingSettings.of(args).as_request()))["temperature"] == 0.7


def test_two_grammars_and_a_temperature_that_no_two_sides_share_are_refused():
    both = {
        "vllm_structured_outputs_regex": "a",
        "generation_kwargs": {"structured_outputs": {"regex": "b"}},
    }
    with pytest.raises(ConfigError, match="set one of them"):
        checks.check_arguments(arguments(**both))
    for cold in (0.0, 0.001):
        with pytest.raises(ConfigError, match=f"temperature={cold}"):
            checks.check_arguments(arguments(temperature=cold))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"generation_kwargs": {k: v}}, k) for k, v in (("top_k", 5), ("min_tokens", 8))),
        *(({"generation_kwargs": {k: v}}, k) for k, v in (("bad_words", ["1"]), ("top_p", 0.9))),
        ({"generation_kwargs": {"logit_bias": {"5": 20}}}, "logit_bias"),
        ({"generation_kwargs": {"structured_outputs": {"regex": "[a-d]"}}}, "structured_outputs"),
        ({"vllm_structured_outputs_regex": "[a-d]{2}"}, "structured_outputs"),
        ({"top_k": 5, "min_p": 0.1}, "top_k, min_p"),
    ],
    ids=str,
)
def test_whatever_changes_the_distribution_is_found_in_the_merged_request(changes, named):
    assert ", ".join(SamplingSettings.of(arguments(**changes)).changes) == named


def test_entry_that_wins_over_its_argument_is_what_counts():
    settings = SamplingSettings.of(arguments(top_k=5, generation_kwargs={"top_k": 0}))
    assert settings.changes == ()


@pytest.mark.parametrize("given", [{"logit_bias": {"64": 1.0}}, {"stop_token_ids": [64]}], ids=str)
def test_ids_of_generation_kwargs_lie_in_the_served_vocabulary(given):
    with pytest.raises(
        ConfigError, match="holds 64; the served vocabulary has token ids from 0 to 63"
    ):
        checks.check_sampling(arguments(generation_kwargs=given), STATUS, dropout=0.0)


# -- the data -----------------------------------------------------------------------------------------


def trainer(train, evaluation=None, tokenize=None, **args):
    tokenizer = make_tokenizer()

    def as_trl(batch):
        if not isinstance(batch[0], str):
            return tokenizer.apply_chat_template(batch, return_dict=True)["input_ids"], None, {}
        return tokenizer(text=batch)["input_ids"], None, {}

    values = {"eval_strategy": "no", "eval_on_start": False, **args}
    return SimpleNamespace(
        args=SimpleNamespace(**values),
        train_dataset=train,
        eval_dataset=evaluation,
        _tokenize_prompts=tokenize or as_trl,
    )


def data(*texts):
    return Dataset.from_dict({"prompt": list(texts), "answer": ["1"] * len(texts)})


SHORT, FITS, LONG = "1+2=", "1" * 80, "1" * 81


def test_first_row_that_cannot_fit_is_named_with_its_length_and_what_fits():
    prompts.check_prompts(trainer(data(SHORT, FITS)), STATUS, 16)
    rows = [SHORT] * 600 + [LONG, LONG]
    with pytest.raises(
        ConfigError, match=r"train_dataset\[600\]: its prompt has 81 tokens, and 80 fit"
    ) as e:
        prompts.check_prompts(trainer(data(*rows)), STATUS, 16)
    assert "--max-model-len" in str(e.value) and "max_completion_length=16" in str(e.value)


def test_conversation_is_measured_as_the_chat_template_writes_it():
    chats = [
        [{"role": "system", "content": "1" * 40}, {"role": "user", "content": "2" * n}]
        for n in (39, 40)
    ]
    with pytest.raises(ConfigError, match=r"train_dataset\[1\]: its prompt has 81 tokens"):
        prompts.check_prompts(trainer(Dataset.from_dict({"prompt": chats})), STATUS, 16)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no tokens"),
        ([1, 64], "holds token id 64, and the served vocabulary has ids from 0 to 63"),
    ],
)
def test_prompt_without_tokens_or_with_unknown_ones_is_named(ids, message):
    made = trainer(data(SHORT), tokenize=lambda batch: ([ids], None, {}))
    with pytest.raises(ConfigError, match=rf"train_dataset\[0\]: its prompt .*{message}"):
        prompts.check_prompts(made, STATUS, 16)


def test_data_of_an_evaluation_counts_where_training_evaluates():
    for evaluation, name in (
        (data(SHORT, LONG), r"eval_dataset\[1\]"),
        ({"hard": data(LONG)}, "'hard'"),
    ):
        prompts.check_prompts(trainer(data(SHORT), evaluation), STATUS, 16)
        for evaluates in ({"eval_strategy": "steps"}, {"eval_on_start": True}):
            with pytest.raises(ConfigError, match=name):
                prompts.check_prompts(trainer(data(SHORT), evaluation, **evaluates), STATUS, 16)


def test_first_rows_of_a_stream_are_looked_at_and_only_those(caplog):
    stream = data(*[SHORT] * 1024, LONG).to_iterable_dataset()
    caplog.set_level("INFO", logger="tink_rl")
    prompts.check_prompts(trainer(stream), STATUS, 16)
    assert "looked at the first 1024 of a stream's prompts" in caplog.text
    with pytest.raises(ConfigError, match=r"train_dataset\[3\]"):
        prompts.check_prompts(trainer(data(*[SHORT] * 3, LONG).to_iterable_dataset()), STATUS, 16)


def test_look_at_a_large_data_set_ends_in_time_and_says_how_far_it_came(caplog, monkeypatch):
    caplog.set_level("INFO", logger="tink_rl")
    monkeypatch.setattr(prompts, "_LOOK_S", 0.0)
    prompts.check_prompts(trainer(data(*[SHORT] * 300, LONG)), STATUS, 16)
    assert "looked at the first 256 of 301 prompts" in caplog.text


def test_prompts_of_an_environment_are_not_known_before_it_is_reset():
    made = trainer(None)
    made.environment_factories = {None: object}
    prompts.check_prompts(made, STATUS, 16)


def test_data_without_prompts_is_told_which_columns_it_has():
    found = Dataset.from_dict({"question": ["1+1="], "answer": ["2"]})
    with pytest.raises(ConfigError, match=r"question, answer and no 'prompt'.*rename_column"):
        prompts.check_prompts(trainer(found), STATUS, 16)
