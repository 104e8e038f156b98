"""Which fields a request may have, what each of them changes, and what is said of the others."""

from __future__ import annotations

import math

import pytest

from tink_rl.errors import SamplingRefused
from tink_rl.transport.request_fields import check_fields, distribution_changes

CHANGING = (
    *({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"min_tokens": 8}, {"bad_words": ["1"]}),
    *({"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.1}),
    *({"logit_bias": {"5": 20}}, {"allowed_token_ids": [1, 2]}, {"thinking_token_budget": 4}),
    {"structured_outputs": {"regex": "[a-d]{2}"}},
    *({"structured_outputs": {"choice": ["a"]}}, {"response_format": {"type": "json_object"}}),
)
LEAVING = (
    *({"top_p": 1.0}, {"top_k": 0}, {"top_k": -1}, {"min_p": 0.0}, {"min_tokens": 0}),
    *({"bad_words": []}, {"repetition_penalty": 1}, {"presence_penalty": 0.0}, {"logit_bias": {}}),
    *(
        {"logit_bias": {"5": 0.0}},
        {"allowed_token_ids": None},
        {"response_format": {"type": "text"}},
    ),
    *({"structured_outputs": None}, {"temperature": 0.7}, {"max_tokens": 3}, {"stop": ["x"]}),
    *({"stop_token_ids": [5]}, {"ignore_eos": True}, {"seed": 1}, {"logprobs": 3}),
    *({"skip_special_tokens": False}, {"prompt_logprobs": 0}, {"thinking_token_budget": -1}),
)


@pytest.mark.parametrize("request_", CHANGING, ids=str)
def test_field_that_changes_what_is_drawn_from_is_named(request_):
    check_fields(request_)
    assert distribution_changes({"n": 4, **request_}) == tuple(request_)


@pytest.mark.parametrize("request_", LEAVING, ids=str)
def test_field_that_leaves_the_distribution_alone_is_not(request_):
    check_fields(request_)
    assert distribution_changes(request_) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 3}, "vLLM's is max_tokens"),
        ({"do_sample": False}, "temperature=0 is greedy"),
        ({"num_beams": 4}, "without beams"),
        ({"length_penalty": 0.5}, "weighs beams"),
        ({"no_repeat_ngram_size": 3}, "no counterpart"),
        ({"eos_token_id": 5}, "stop_token_ids"),
        ({"suppress_tokens": [5]}, "logit_bias"),
        ({"num_return_sequences": 4}, "num_generations"),
        ({"typical_p": 0.9}, "no counterpart"),
        ({"guided_regex": "a"}, "structured_outputs="),
        ({"best_of": 2}, "set n"),
        ({"no_such_parameter": 1}, "no field 'no_such_parameter'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"top-k": 1}, "did you mean 'top_k'"),
        ({"echo": True}, "as if it had been sampled"),
        ({"stream": True}, "answers come whole"),
        ({"stream_options": {"include_usage": True}}, "answers come whole"),
        ({"use_beam_search": True}, "beams are no samples"),
        ({"truncate_prompt_tokens": 2}, "shorten the prompts"),
        ({"suffix": "x"}, "leave it out"),
        ({"prompt_embeds": "x"}, "token ids or texts"),
        ({"logprob_token_ids": [1]}, "logprobs=K"),
        ({"model": "other"}, "model= of the call"),
        ({"prompt": "x"}, "prompts of the call"),
        ({"return_token_ids": False}, "always come back"),
        ({"cache_salt": "x"}, "cached prefixes"),
        ({"request_id": "x"}, "leave it out"),
        ({"vllm_xargs": {"a": 1}}, "unchecked"),
        ({"extra_args": {"a": 1}}, "unchecked"),
        ({"chat_template": "x"}, "stopped by a template"),
    ],
    ids=str,
)
def test_field_that_no_answer_could_honour_is_refused_with_what_to_do_instead(given, message):
    (name,) = given
    with pytest.raises(SamplingRefused, match=message) as caught:
        check_fields(given, shown="generation_kwargs[{!r}]".format)
    assert f"generation_kwargs[{name!r}]" in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        *({"max_tokens": v} for v in (0, -1, 1.5, True, "5", 2**31)),
        *({"temperature": v} for v in (-0.1, 2.1, math.nan, math.inf, "1", True)),
        *({"top_p": v} for v in (0.0, 1.1, math.nan)),
        *({"logit_bias": v} for v in ([5], {"5": math.nan}, {"5": 101}, {"5": "x"})),
        *({"stop": v} for v in ("", [""], [5], 5)),
        *({"structured_outputs": v} for v in ("[a-d]", ["a"], {"regx": "a"})),
        *({"bad_words": "1"}, {"allowed_token_ids": []}),
        *({"ignore_eos": "yes"}, {"ignore_eos": 1}, {"stop_token_ids": 5}, {"bad_words": [5]}),
        *({"seed": 2**64}, {"seed": 1.0}, {"min_p": -0.1}, {"top_k": -2}, {"top_k": 1.5}),
        *({"min_tokens": 5, "max_tokens": 4}, {"repetition_penalty": 0.0}, {"logprobs": -2}),
    ],
    ids=str,
)
def test_value_that_vllm_would_refuse_is_named_before_it_is_sent(given):
    with pytest.raises(SamplingRefused, match=f"^{next(iter(given))}"):
        check_fields(given)


def test_field_at_the_value_that_does_nothing_passes_and_none_is_left_out():
    check_fields({"echo": False, "stream": False, "use_beam_search": False, "length_penalty": 1.0})
    check_fields({"no_such_parameter": None, "echo": None})
