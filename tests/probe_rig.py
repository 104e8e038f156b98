"""A server that is a second PEFT model in this process: what a probe sees of right and wrong policies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch

from tests.policies import PeftTwin
from tink_rl.config import SyncConfig
from tink_rl.publish.probes import ProbeCheck
from tink_rl.training.probe import Prober
from tink_rl.types import PROTOCOL_VERSION, ServerState, ServerStatus, SyncMode

VOCAB = 64


class TwinServer:
    """Answers as `model` computes; decoded tokens as `decodes` does, where that is another one."""

    url = "http://twin"

    def __init__(self, model: Any, **status: Any) -> None:
        self.model, self.decodes = model, model
        self.num_requests = 0
        self.state = {"dtype": "float32", "adapter_dtype": "float32", "device": "cpu", **status}
        self.client = self

    def status(self) -> ServerStatus:
        return ServerStatus(
            protocol=PROTOCOL_VERSION,
            incarnation="twin",
            state=ServerState.READY,
            modes=(SyncMode.ADAPTER,),
            world_size=1,
            base_model="base",
            base_fingerprint="f",
            max_lora_rank=16,
            max_loras=2,
            logprobs_mode="processed_logprobs",
            served={},
            **{"max_model_len": 256, **self.state},
        )

    @torch.no_grad()
    def continuation(self, prompt_ids: Any, name: str, num_tokens: int) -> Any:
        self.num_requests += 1
        ids, logprobs = list(prompt_ids), _logprobs(self.model, prompt_ids)
        for number in range(num_tokens):
            model = self.decodes if number else self.model
            row = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        return ids, logprobs


def _logprobs(model: Any, ids: Any) -> list[float]:
    ids_BT = torch.tensor([list(ids)])
    rows_TV = model(input_ids=ids_BT).logits[0, :-1].float().log_softmax(-1)
    found: list[float] = rows_TV.gather(-1, ids_BT[0, 1:, None])[:, 0].tolist()
    return found


class TwinSync:
    """As much of a `WeightSync` as `Prober.prove` needs; publishes into the server's model at once."""

    def __init__(self, server: TwinServer, collector: Any, **config: Any) -> None:
        self.config = SyncConfig(**{"mode": "adapter", **config})
        self.mode, self.status, self._server, self._collector = (
            SyncMode.ADAPTER,
            server.status(),
            server,
            collector,
        )
        fleet: Any = SimpleNamespace(
            each=lambda work: [work(server)], statuses=lambda: [server.status()]
        )
        self.probes = ProbeCheck(fleet, self.config)
        self.applies = True
        self._stack = ExitStack()

    def publish(self, adapter: Any, *, synthetic: bool) -> Any:
        if self.applies:
            self._stack.enter_context(self._collector.swapped(adapter))
        return SimpleNamespace(name="policy@0")

    def drop_current(self) -> None:
        self._stack.close()


class Rig:
    """A trainer and a server that hold the same policy, in given precisions."""

    def __init__(self, directory: Any, precision: str = "fp32", **lora: Any) -> None:
        self.twin, served = (PeftTwin(directory, **lora) for _ in range(2))
        self.server = TwinServer(served.model)
        self.served = served
        if precision in ("autocast", "bf16 server"):
            under_autocast(self.twin.model)
        if precision == "bf16":
            self.twin.model.to(torch.bfloat16)
        if precision in ("bf16 server", "bf16"):
            self.server.model.to(torch.bfloat16)
            self.server.state |= {"dtype": "bfloat16", "adapter_dtype": "bfloat16"}
        self.prober = Prober(self.twin.model, vocab_size=VOCAB)
        self.sync: Any = TwinSync(self.server, served.collector)

    def train(self, size: float, seed: int = 1) -> None:
        """Let the trainer hold an adapter of that size, which the server holds too."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.twin.model.named_parameters():
                if "lora_" in name:
                    scale = size if "lora_B" in name else parameter.shape[-1] ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        self.serve(lambda name, value: value)

    def serve(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Let the server hold the trainer's adapter, each tensor as `change(name, tensor)` makes it."""
        trained = dict(self.twin.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.server.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(change(name, trained[name]))

    def decode_with(self, size: float) -> None:
        """Let the server decode with weights of another version."""
        self.server.decodes = copy.deepcopy(self.server.model)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in self.server.decodes.named_parameters():
                if "lora_B" in name:
                    parameter += torch.randn(parameter.shape, generator=generator) * size

    def check(self) -> float:
        """What the next probe finds."""
        return self.prober.check(self.sync, "policy@7")


def under_autocast(model: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    """Wrap `model.forward` as accelerate does under `bf16=True`."""
    model.forward = torch.autocast("cpu", dtype=dtype)(model.forward)
