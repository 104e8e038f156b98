"""How many functions of ours a packet, a prompt and a request of the service go through.

`python -m benchmarks.hops [--list]`. Trainer, control routes, a vLLM worker's receiver and the sampling
service run in this process, over real sockets; only vLLM's engine is a stand-in. Each way is gone until
nothing is opened or looked up for the first time, then three times with every function noted that any
thread enters. What is entered each time counts, once; a hop is a function that calls another of ours.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import tink_rl

_ROOT = str(Path(tink_rl.__file__).parent)
_TOKEN = "token-of-the-control-routes"
_WARM_UPS, _WALKS = 3, 3
_REST_S = 1.2
"""What other threads get to finish what belongs to a way, and to show what they do without one."""


def main() -> None:
    """Print the table, or every function."""
    parser = argparse.ArgumentParser(description="functions on the way of a packet, ...")
    parser.add_argument("--list", action="store_true", help="name them, in the order of entry")
    args = parser.parse_args()
    found = measure()
    print("| way | hops | all functions | files |\n|---|---|---|---|")
    for way, entered in found.items():
        files = {name.partition(":")[0] for name in entered}
        print(f"| {way} | {sum(entered.values())} | {len(entered)} | {len(files)} |")
    if args.list:
        for way, entered in found.items():
            lines = [f"  {'>' if is_hop else ' '} {name}" for name, is_hop in entered.items()]
            print(f"\n{way}", *lines, sep="\n")


def measure() -> dict[str, dict[str, bool]]:
    """By way, the functions that were entered (`file:function`), and whether each is a hop."""
    walk = Walk()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack, walk.watched():
        return {way: walk.of(go) for way, go in _ways(Path(directory), stack)}


class Walk:
    """Notes which functions of the package are entered, in threads that began while it watches."""

    def __init__(self, *, rest_s: float = _REST_S) -> None:
        self._rest_s = rest_s
        self._entered: dict[str, bool] | None = None
        self._idle: set[str] = set()
        """What threads begin with while nothing goes on: sweeps, heartbeats."""
        self._own = threading.local()
        self._names: dict[CodeType, str] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """This thread, and all that begin in the block, say what they enter."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def of(self, go: Callable[[], object]) -> dict[str, bool]:
        """What `go` enters once everything is warm, in order; whether it calls another of ours."""
        for _ in range(_WARM_UPS):
            go()
        time.sleep(self._rest_s)
        self._idle = set()
        self._idle = set(self._noted(lambda: None))
        notes = [self._noted(go) for _ in range(_WALKS)]
        always = set.intersection(*(set(note) for note in notes))
        return {n: any(note[n] for note in notes) for n in notes[0] if n in always}

    def _noted(self, go: Callable[[], object]) -> dict[str, bool]:
        found: dict[str, bool] = {}
        self._entered = found
        go()
        time.sleep(self._rest_s)
        self._entered = None
        return found

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        entered = self._entered
        if entered is None or event not in ("call", "return"):
            return
        name = self._name(frame.f_code)
        if not name:
            return
        if getattr(self._own, "of", None) is not entered:
            self._own.of, self._own.stack = entered, []
        stack: list[str] = self._own.stack
        if event == "return":
            del stack[-1:]
            return
        stack.append(name)
        if stack[0] not in self._idle:
            entered.setdefault(name, False)
            if stack[-2:-1] not in ([], [name]):
                entered[stack[-2]] = True

    def _name(self, code: CodeType) -> str:
        """`file:function`; empty for one that is not ours, or has no name of its own."""
        if code not in self._names:
            is_named = not code.co_name.startswith(("<", "__"))
            file = code.co_filename.removeprefix(_ROOT + "/")
            ours = is_named and file != code.co_filename
            self._names[code] = f"{file}:{code.co_qualname}" if ours else ""
        return self._names[code]


# -- the ways ---------------------------------------------------------------------------------------


def _ways(directory: Path, stack: ExitStack) -> Iterator[tuple[str, Callable[[], object]]]:
    from tink_rl.config import SyncConfig
    from tink_rl.publish.vllm_client import VLLMClient
    from tink_rl.training.generation import PolicyGeneration, SamplingSettings

    base, model = _base(directory / "base")
    client = VLLMClient(_serve(_app(base, model), stack), token=_TOKEN)
    config = SyncConfig(mode="adapter", probe_every=0)
    publisher = _publisher(model, client, config, str(base))
    stack.callback(publisher.close)
    yield "packet", _step_ended(publisher, model)
    generation = PolicyGeneration(
        [client],
        SamplingSettings(max_completion_length=2),
        current=lambda: publisher.current,
        sync=lambda: None,
        recover=publisher.recover,
    )
    yield "prompt", lambda: generation.generate([[5, 6]], None, 1)
    url, name = _service(directory, client, stack), publisher.current
    yield "caller", lambda: _ask(url, name)


def _base(directory: Path) -> tuple[Path, Any]:
    """A saved model of one layer, and the same with a LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    loaded = Qwen3ForCausalLM.from_pretrained(directory)
    return directory, get_peft_model(loaded, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def _publisher(model: Any, client: Any, config: Any, base: str) -> Any:
    from tink_rl.training.policy_publisher import PolicyPublisher
    from tink_rl.training.ranks import Ranks

    return PolicyPublisher(
        model,
        SimpleNamespace(is_main_process=True, process_index=0, num_processes=1),  # type: ignore[arg-type]
        clients=[client],
        config=config,
        base_model=base,
        prober=None,  # type: ignore[arg-type]  # it computes; who asks for it is not on the way
        ranks=Ranks(0, 1, timeout_s=60.0),
    )


def _step_ended(publisher: Any, model: Any) -> Callable[[], None]:
    """Change the adapter, and let the callback know that a step has ended."""
    import torch

    from tink_rl.training.publishing import PublishCallback

    state: Any = SimpleNamespace(global_step=1)
    callback = PublishCallback(None, publisher, publisher.publish)  # type: ignore[arg-type]
    trained = [p for name, p in model.named_parameters() if "lora_" in name]

    def ended() -> None:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.01)
        callback.on_step_end(None, state, None)  # type: ignore[arg-type]

    return ended


# -- a server without vLLM's engine -------------------------------------------------------------------


def _app(base: Path, model: Any) -> Any:
    from fastapi import FastAPI

    from tink_rl.server.admission import GateMiddleware
    from tink_rl.server.gate import GATE
    from tink_rl.server.routes import router

    app = FastAPI()
    app.add_middleware(GateMiddleware)
    app.include_router(router)
    numbers = itertools.count(1)
    models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name=str(base), model_path=str(base))],
        lora_requests={},
        lora_id_counter=SimpleNamespace(inc=lambda _: next(numbers)),
    )
    app.state.tink_token = _TOKEN
    app.state.tink = _control(base, models, _Engine(_worker(model)), GATE)

    @app.get("/v1/models")
    async def cards() -> Any:
        names = [models.base_model_paths[0].name, *models.lora_requests]
        return {"data": [{"id": n, "root": str(base), "max_model_len": 64} for n in names]}

    @app.post("/v1/completions")
    async def complete(asked: dict[str, Any]) -> Any:
        choice = {
            **{"text": "x", "token_ids": [7], "prompt_token_ids": [5], "finish_reason": "stop"},
            "logprobs": {"tokens": ["token_id:7"], "token_logprobs": [-0.5], "top_logprobs": None},
        }
        count = len(asked["prompt"]) * asked["n"]
        return {"model": asked["model"], "choices": [{**choice, "index": i} for i in range(count)]}

    return app


def _control(base: Path, models: Any, engine: Any, gate: Any) -> Any:
    from tink_rl.plugin_settings import PluginSettings
    from tink_rl.policy.fingerprint import base_fingerprint
    from tink_rl.server import endpoints, writers
    from tink_rl.server.content import ServedContent
    from tink_rl.server.state import ServedState
    from tink_rl.types import SyncMode

    writers.LEASE_S = 3600.0  # no heartbeat comes between
    content = ServedContent(str(base))
    facts = {
        **{"world_size": 1, "base_fingerprint": base_fingerprint(base), "device": "cpu"},
        **{"dtype": "float32", "adapter_dtype": "float32", "logprobs_mode": "processed_logprobs"},
        **{"max_lora_rank": 16, "max_loras": 2, "max_model_len": 64, "vocab_size": 64},
        **{"base_files": content.identity, "no_full_logprobs": None},
    }
    state = ServedState(
        engine=engine, models=models, gate=gate, modes=(SyncMode.ADAPTER,), facts=facts
    )
    return endpoints._control(state, content, SimpleNamespace, PluginSettings())


class _Engine:
    """Asks one worker, in the event loop of the API server."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(self._worker, method)(*args)]


def _worker(model: Any) -> Any:
    """A receiver whose slots take what `model` trains; vLLM would be asked by `add_lora`."""
    import torch

    from tink_rl.server import modules, names, receiver

    sys.modules.setdefault(  # the receiver takes vLLM's record of a request from there
        "tink_rl.server.vllm_names",
        SimpleNamespace(LoRARequest=SimpleNamespace),  # type: ignore[arg-type]
    )
    state = receiver._State(rank=0, device=torch.device("cpu"))
    state.max_lora_rank = 16
    layers = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            rows, columns = layer.base_layer.weight.shape
            shard = modules.Shard(
                name=name,
                layer=name,
                shard_id=None,
                shape=(rows, columns),
                rows=slice(0, rows),
                columns=slice(0, columns),
            )
            layers[name] = modules.Layer(name=name, module=layer, shards=(shard,))
    state.names = names.Names(None, layers)
    worker: Any = receiver.TinkWorkerExtension()
    worker.tink_state_ = state
    worker.add_lora = worker.remove_lora = lambda _: True
    return worker


def _serve(app: Any, stack: ExitStack) -> str:
    """The URL of `app`, served until `stack` ends."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(10.0)

    stack.callback(stop)
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    return f"http://127.0.0.1:{port}"


# -- the sampling service -----------------------------------------------------------------------------


def _service(directory: Path, client: Any, stack: ExitStack) -> str:
    from tink_rl.sampling import server_view
    from tink_rl.vllm_backend import VLLMBackend
    from tink_rl.worker.app import create_app
    from tink_rl.worker.auth import Tokens
    from tink_rl.worker.backends.vllm import VLLMSampler
    from tink_rl.worker.http_server import HttpServer, bind
    from tink_rl.worker.options import WorkerOptions
    from tink_rl.worker.service import WorkerService

    server_view.STALE_S = 3600.0  # no look at the server comes between
    backend = VLLMBackend(
        {"base_url": client.base_url, "tink_store_dir": str(directory / "store")}, client=client
    )
    service = WorkerService(
        VLLMSampler(backend),
        None,
        options=WorkerOptions(),
        tokens=Tokens(admin=_TOKEN),
        readiness=SimpleNamespace(  # type: ignore[arg-type]  # a canary would be counted with the caller
            note_success=lambda: None, note_delta=lambda: None, reason=None, run=_nothing
        ),
    ).start()
    server = HttpServer(create_app(service), bind("127.0.0.1", 0), num_threads=4)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for end in (lambda: thread.join(10.0), server.stop, service.stop):
        stack.callback(end)
    return server.url


async def _nothing() -> None:
    pass


def _ask(url: str, model: str) -> None:
    import httpx

    body = {
        "prompts": ["x"],
        "model_id": model,
        "sampling_params": {"max_tokens": 2, "logprobs": 0},
    }
    httpx.post(f"{url}/api/v1/sample", json=body, timeout=30.0).raise_for_status()


if __name__ == "__main__":
    main()
