"""Requests that the worker must refuse, written down and generated; none may reach a backend."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from tests.fakes import MAX_MODEL_LEN, VOCAB_SIZE
from tests.worker_rig import ADMIN

PARAMS: list[tuple[str, Any]] = [
    ("max_tokens", v) for v in (-1, 0, "5", 1.5, True, 2**31, None, MAX_MODEL_LEN + 1, 10**400)
]
PARAMS += [("n", v) for v in (0, 17, 10**9, True, 1.0, None, [1])]
PARAMS += [("temperature", v) for v in (-1, 2.1, "1", True, None)]
PARAMS += [("top_p", v) for v in (0, 1.1, -0.1, False)]
PARAMS += [("top_k", v) for v in (-2, 1.5, 2**31)] + [("min_p", v) for v in (-0.1, 1.1)]
PARAMS += [("seed", v) for v in (2**64, -1, 1.5, True)]
PARAMS += [("logprobs", v) for v in (10**6, 21, -1, True)]
PARAMS += [("stop", v) for v in ("", ["a"] * 5, ["x" * 65], [""], [1], 5, None)]
PARAMS += [("stop_token_ids", v) for v in ([-1], [VOCAB_SIZE], [True], ["1"], 5, [1] * 65)]
PARAMS += [("min_tokens", v) for v in (-1, 17)]
PARAMS += [("repetition_penalty", v) for v in (0, -1)]
PARAMS += [("presence_penalty", v) for v in (-2.1, 2.1)]
PARAMS += [("frequency_penalty", v) for v in (-2.1, 2.1)]
PARAMS += [("ignore_eos", v) for v in (1, "true", None)]
PARAMS += [
    ("logit_bias", v)
    for v in (
        {str(VOCAB_SIZE): 1},
        {"-1": 1},
        {"x": 1},
        {"1": 101},
        {"1": "1"},
        {"1": True},
        {str(i): 1 for i in range(301)},
        {"9" * 4000: 1},
        [1],
    )
]
_NEVER = ("regex", "chat_template", "chat_template_kwargs", "extra_args", "structured_outputs")
PARAMS += [(name, {}) for name in _NEVER] + [("best_of", 2), ("prompt_logprobs", 1)]


PROMPTS: list[tuple[Any, str]] = [
    ([], "prompts"),
    (None, "prompts"),
    ("text", "prompts"),
    ({}, "prompts"),
    (["x"] * 65, "64"),
    ([""], "[0]"),
    (["x", ""], "[1]"),
    (["x", None], "[1]"),
    (["x", 5], "[1]"),
    ([[]], "[0]"),
    ([[1], []], "[1]"),
    ([["x"]], "[0]"),
    ([[[1]]], "[0]"),
    (["x", [1]], "[1]"),
    ([[1], "x"], "[1]"),
    ([[-1]], "[0]"),
    ([[1], [VOCAB_SIZE]], "[1]"),
    ([[2**63]], "[0]"),
    ([[True]], "[0]"),
    ([[1.0]], "[0]"),
    ([[1] * MAX_MODEL_LEN], "[0]"),
]


@dataclass(frozen=True)
class BadRequest:
    """One request, for any client."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes


def bad_request(chance: random.Random, token: str = ADMIN) -> BadRequest:
    """Some request that every worker refuses; `token` is its admin token."""
    kinds = ["parameter", "parameter", "prompts", "model", "json", "route", "registration"]
    kind = chance.choice(kinds)
    if kind == "parameter":
        name, value = chance.choice(PARAMS)
        params = {"max_tokens": 16, name: value}
        return _sample(_dump({"prompts": ["x"], "sampling_params": params}))
    if kind == "prompts":
        return _bad_prompts(chance)
    if kind == "model":
        return _unknown_model(chance)
    if kind == "json":
        return _bad_json(chance)
    return _bad_route(chance) if kind == "route" else _bad_registration(chance, token)


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _sample(content: bytes, content_type: str = "application/json") -> BadRequest:
    return BadRequest("POST", "/api/v1/sample", {"Content-Type": content_type}, content)


def _bad_prompts(chance: random.Random) -> BadRequest:
    prompts, _ = chance.choice(PROMPTS)
    if isinstance(prompts, list) and len(prompts) == 1 and chance.random() < 0.5:
        prompts = [[1, 2, 3]] * chance.randint(1, 63) + prompts
    return _sample(_dump({"prompts": prompts}))


def _unknown_model(chance: random.Random) -> BadRequest:
    name = "".join(chance.choices("abcdefghij", k=8))
    model_id = name + chance.choice(["", "@1", "@999999"])
    return _sample(_dump({"prompts": ["x"], "model_id": model_id}))


def _bad_json(chance: random.Random) -> BadRequest:
    good = _dump({"prompts": ["x" * chance.randint(1, 50)], "model_id": "a"})
    kind = chance.randint(0, 4)
    if kind == 0:  # an object that ends early
        return _sample(good[: chance.randint(0, len(good) - 1)])
    if kind == 1:  # a byte that no UTF-8 has
        at = chance.randint(0, len(good))
        return _sample(good[:at] + bytes([chance.choice([0xC0, 0xF5, 0xFF])]) + good[at:])
    if kind == 2:  # noise
        return _sample(chance.randbytes(chance.randint(1, 200)))
    if kind == 3:  # unknown keys
        key = "".join(chance.choices("abcdefghij_", k=12))
        return _sample(_dump({"prompts": ["x"], key: chance.choice([1, "x", None, [], {}])}))
    return _sample(good, chance.choice(["text/json", "text/plain", "application/xml", "*/*"]))


_PATHS = (
    *("/api/v1/sample", "/api/v1/sample/", "/api//v1/sample", "/api/v1/sample;x", "/", "/health"),
    *("/api/v2/sample", "/api/v1/../v2/sample", "/livez/x", "/api/v1/adapters/a/b"),
)


def _bad_route(chance: random.Random) -> BadRequest:
    method = chance.choice(["GET", "PUT", "PATCH", "TRACE", "OPTIONS", "DELETE", "FOO"])
    more = chance.choice([{}, {"X-HTTP-Method-Override": "POST"}, {"Host": "x/livez?"}])
    headers = {"Content-Type": "application/json", **more}
    return BadRequest(method, chance.choice(_PATHS), headers, _dump({"prompts": ["x"]}))


def _bad_registration(chance: random.Random, token: str) -> BadRequest:
    headers = {"Content-Type": "application/json"}
    given = chance.choice(
        ["", "Bearer wrong", f"Basic {token}", f"Bearer {token}x", f"Bearer {token}"]
    )
    if given:
        headers["Authorization"] = given
    wrong: list[Any] = [{}, {"adapter_id": "x"}, {"lora_path": "/x"}, [], "x"]
    wrong += [
        {"adapter_id": bad, "lora_path": "/x"}
        for bad in ("", "../x", "a@1", "x" * 101, "\u00e9", "a\x00", 5, None)
    ]
    wrong += [{"adapter_id": "x", "lora_path": bad} for bad in ("", 5, None, "x" * 4097)]
    wrong += [{"adapter_id": "x", "lora_path": "/x", "more": 1}]
    return BadRequest("POST", "/api/v1/adapters", headers, _dump(chance.choice(wrong)))
