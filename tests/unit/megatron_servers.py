"""Megatron's text-generation servers for tests.

`python -m tests.unit.megatron_servers` serves the real classes of `megatron-core` (their Flask
resources, validation and response building) over a stub engine on the CPU, and prints both URLs as JSON.
`ContractServer` is written from `worker/backends/megatron/contract.py` for what the installed release
does not show.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from types import SimpleNamespace

import torch
from flask import Flask, jsonify, request
from werkzeug.serving import make_server

EOD = 0


class LossyTokenizer:
    """Characters, lower-cased, 'ß' as two: so `len(prompt)` is neither its tokens nor its text."""

    eod = EOD

    def tokenize(self, text):
        return [ord(c) for c in text.lower().replace("ß", "ss")]

    def detokenize(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids if i != EOD)

    def offsets(self, ids, text):
        return list(range(len(ids)))


def continuation(prompt_ids, max_tokens):
    """The prompt backwards over and over; a prompt that begins with 'q' ends after two tokens."""
    if chr(prompt_ids[0]) == "q":
        return [*prompt_ids[::-1][:1], EOD][:max_tokens]
    return [prompt_ids[::-1][i % len(prompt_ids)] for i in range(max_tokens)]


def logprob(position):
    return -0.125 * (position + 1)


class StubEngine:
    """What `run_mcore_engine` asks of an engine."""

    def __init__(self):
        self.controller = SimpleNamespace(
            tokenizer=LossyTokenizer(), sampling_rng=torch.Generator()
        )
        self._ids = iter(range(10**9))

    def get_new_request_id(self):
        return next(self._ids)

    def generate(self, inference_requests):
        for one in inference_requests:
            if "engine refuses" in one.prompt:
                raise ValueError("prompt too long for the engine")
            if "engine fails" in one.prompt:
                raise AssertionError("broken engine")
            ids = one.prompt_tokens
            new = continuation(ids, one.sampling_params.num_tokens_to_generate)
            one.generated_tokens = torch.tensor(new, dtype=torch.long)
            one.generated_text = self.controller.tokenizer.detokenize(new)
            one.segments = [self.controller.tokenizer.detokenize([i]) for i in ids + new]
            values = [logprob(i) for i in range(len(ids) + len(new) - 1)]
            one.prompt_log_probs = values[: len(ids) - 1]
            one.generated_log_probs = values[len(ids) - 1 :]
        return inference_requests


class StubClient:
    """What the dynamic front end asks of its `InferenceClient`."""

    def add_request(self, prompt_tokens, params):
        async def answer():
            await asyncio.sleep(0)
            new = continuation(prompt_tokens, params.num_tokens_to_generate)
            if params.top_k > 0 and params.top_p > 0.0:
                raise AssertionError("Cannot have top-p and top-k both greater than zero")
            result = SimpleNamespace(
                prompt_tokens=prompt_tokens,
                generated_tokens=new,
                generated_text=LossyTokenizer().detokenize(new),
                generated_log_probs=[logprob(i) for i in range(len(new))],
                routing_indices=None,
            )
            return SimpleNamespace(requests=[result], merge=lambda: result)

        return answer()


class Served:
    """A Flask app on a free loopback port, in a thread of its own."""

    def __init__(self, app):
        self.app = app
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


class ContractServer(Served):
    """A server written from the contract; records what it was sent.

    Args:
        kind: "static" (before core 0.15: no `tokens`), "dynamic" (as of main 2026-08), or "none".
    """

    def __init__(self, kind):
        app = Flask(__name__)
        self.seen = []
        self.fault = None
        self.hold = threading.Event()
        self.hold.set()
        self.arrived = threading.Event()
        self.tokenizer = LossyTokenizer()

        @app.before_request
        def remember():
            body = request.get_json(silent=True)
            self.seen.append((request.method, request.path, body))
            if body and self.fault is not None:
                return self.fault
            if body:
                self.arrived.set()
                self.hold.wait(timeout=30)
            return None

        if kind == "static":
            app.add_url_rule("/api", view_func=self._old_static, methods=["PUT"])
        if kind == "dynamic":
            app.add_url_rule("/health", view_func=self._health)
            app.add_url_rule("/v1/completions", view_func=self._dynamic, methods=["POST"])
        super().__init__(app)

    def bodies(self):
        return [body for _, _, body in self.seen if body]

    def _old_static(self):
        body = request.get_json()
        if "prompts" not in body:
            return jsonify("prompts argument required"), 400
        ids = [self.tokenizer.tokenize(p) for p in body["prompts"]]
        rows = [p + continuation(p, body["tokens_to_generate"]) for p in ids]
        logprobs = [[logprob(i) for i in range(len(row) - 1)] for row in rows]
        return {
            "text": [self.tokenizer.detokenize(row) for row in rows],
            "segments": [[self.tokenizer.detokenize([i]) for i in row] for row in rows],
            "logprobs": logprobs if body.get("logprobs") else None,
        }

    def _health(self):
        return {"status": "ok", "service": "Megatron Inference Server", "ready": True}

    def _dynamic(self):
        body = request.get_json()
        prompts = body["prompt"]
        if body["top_k"] > 0 and body["top_p"] > 0.0:
            return "Error during inference: cannot have both", 400
        if prompts == ["busy"]:
            return "transient engine error", 500
        choices = []
        for index, prompt in enumerate(prompts):
            ids = self.tokenizer.tokenize(prompt) if isinstance(prompt, str) else prompt
            new = continuation(ids, body["max_tokens"])
            choices.append(
                {
                    "index": index,
                    "text": self.tokenizer.detokenize(new),
                    "logprobs": None,
                    "finish_reason": "stop" if new[-1:] == [EOD] else "length",
                    "prompt_token_ids": ids,
                    "generation_token_ids": new,
                    "generation_log_probs": [logprob(i) for i in range(len(new))],
                }
            )
        # The order is not promised.
        return {"id": "x", "model": "EMPTY", "choices": choices[::-1]}


def _serve_real():
    """The release's own resources; only what needs CUDA or a process group is replaced."""
    from megatron.core import mpu
    from megatron.core.inference.text_generation_server import text_generation_server as static
    from megatron.core.inference.text_generation_server import tokenization
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import endpoints

    # the package binds a function of the same name over the module
    running = sys.modules["megatron.core.inference.text_generation_server.run_mcore_engine"]

    def tokenize(tokenizer, prompts, tokens_to_generate, add_BOS, data_parallel):
        tokens, lengths = tokenization._tokenize_prompts_and_batch(
            tokenizer, prompts, tokens_to_generate, add_BOS
        )
        return tokens, lengths

    class OnCpu:
        """`torch` as tokenization sees it, with device='cuda' meaning the CPU."""

        long = torch.long

        @staticmethod
        def tensor(data, dtype, device):
            return torch.tensor(data, dtype=dtype)

    tokenization.torch = OnCpu
    static.send_do_generate = lambda: None
    running.tokenize_prompts = tokenize
    running.broadcast_float_list = lambda size, float_list, data_parallel: torch.tensor(float_list)
    mpu.is_pipeline_first_stage = lambda: True

    dynamic = Flask("dynamic")
    dynamic.config.update(client=StubClient(), tokenizer=LossyTokenizer(), verbose=False)
    for blueprint in endpoints.__all__:
        dynamic.register_blueprint(blueprint)
    servers = [Served(static.MegatronServer(StubEngine()).app), Served(dynamic)]
    print(json.dumps([server.url for server in servers]), flush=True)
    sys.stdin.read()  # until the test that started us closes the pipe
    for server in servers:
        server.close()


if __name__ == "__main__":
    _serve_real()
