"""What the server tests share: a PEFT model beside a server, and what it would answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tink_rl.config import SyncConfig
from tink_rl.launch import VLLMServer
from tink_rl.policy.adapter import Adapter
from tink_rl.policy.collect import collector_for
from tink_rl.publish.publisher import WeightSync

NUM_TOKENS = 8
CLEAR_GAP = 0.05
"""Greedy answers are compared only where the top two logits are further apart: near ties flip."""


class PeftTwin:
    """The same base in transformers with a LoRA of given settings."""

    def __init__(self, directory: Path, **lora: Any) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **lora}
        self.directory = directory
        self.model = get_peft_model(base, LoraConfig(**settings)).eval()
        self.collector: Any = collector_for(self.model, directory)
        self._base_answers: dict[int, list[list[int]]] = {}
        """Greedy tokens of the base, by length of the prompts of `clear_cases`."""

    def randomise(self, seed: int) -> None:
        """Random A and B, of a size that changes the answers."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)

    @torch.no_grad()
    def greedy(
        self, prompts: list[list[int]], adapter: bool = True
    ) -> list[tuple[list[int], bool]]:
        """Greedy tokens of prompts of one length, and whether every choice was clear."""
        context = _nothing() if adapter else self.model.disable_adapter()
        ids_BT = torch.tensor(prompts)
        with context:
            output = self.model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        top2 = torch.stack(output.logits, dim=1).topk(2).values
        clear = (top2[..., 0] - top2[..., 1] > CLEAR_GAP).all(dim=1)
        tokens = output.sequences[:, ids_BT.shape[1] :]
        return list(zip(tokens.tolist(), clear.tolist(), strict=True))

    @torch.no_grad()
    def logprobs(self, prompt: tuple[int, ...], tokens: list[int]) -> list[float]:
        """Of `tokens` after `prompt`, with the adapter."""
        ids_BT = torch.tensor([[*prompt, *tokens]])
        logits_TV = self.model(input_ids=ids_BT).logits[0, len(prompt) - 1 : -1].float()
        found = logits_TV.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        return list(found[:, 0].tolist())

    def clear_cases(self, count: int = 4, adapter: bool = True) -> dict[tuple[int, ...], list[int]]:
        """Prompts (of two lengths) whose greedy answers are clear, with the answers.

        With the adapter only such that the base answers otherwise: a dropped adapter would be seen.
        """
        generator = torch.Generator().manual_seed(5)
        cases: dict[tuple[int, ...], list[int]] = {}
        for length in (4, 11):
            prompts = torch.randint(
                3, self.model.config.vocab_size, (32, length), generator=generator
            ).tolist()
            answers = self.greedy(prompts, adapter)
            if adapter and length not in self._base_answers:
                base = self.greedy(prompts, adapter=False)
                self._base_answers[length] = [tokens for tokens, _ in base]
            others = self._base_answers[length] if adapter else [[]] * len(prompts)
            found = [
                (tuple(prompt), tokens)
                for prompt, (tokens, clear), other in zip(prompts, answers, others, strict=True)
                if clear and tokens != other
            ]
            assert len(found) >= count // 2, f"{len(found)} of 32 prompts have telling answers"
            cases |= dict(found[: count // 2])
        return cases


class WholeTwin(PeftTwin):
    """The same base in transformers, all of it trained: the adapter adds to a base that was changed."""

    def shake_base(self, seed: int, size: float = 0.05) -> None:
        """Add noise to every tensor of the base."""
        generator = torch.Generator().manual_seed(seed)
        self._base_answers = {}
        with torch.no_grad():
            for parameter in self.tensors().values():
                parameter += torch.randn(parameter.shape, generator=generator) * size

    def tensors(self) -> dict[str, torch.Tensor]:
        """The base's tensors by their names in the checkpoint."""
        return {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if "lora_" not in name
        }

    def base_cases(self) -> dict[tuple[int, ...], list[int]]:
        """Prompts that the changed base answers clearly, and otherwise than the checkpoint does."""
        cases = self.clear_cases(count=16, adapter=False)
        fresh = PeftTwin(self.directory)
        old = {p: fresh.greedy([list(p)], adapter=False)[0][0] for p in cases}
        telling = {p: tokens for p, tokens in cases.items() if tokens != old[p]}
        assert len(telling) >= 2, "the change of the base does not show"
        return dict(list(telling.items())[:4])


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def served_greedy(server: VLLMServer, model: str, prompts: Any) -> list[list[int]]:
    """Greedy tokens of the server under the name `model`."""
    with server.client() as client:
        output = client.generate(
            [list(p) for p in prompts],
            temperature=0.0,
            max_tokens=NUM_TOKENS,
            model=model,
            generation_kwargs={"ignore_eos": True},
        )
    return list(output["completion_ids"])


def assert_served(server: VLLMServer, name: str, cases: dict[tuple[int, ...], list[int]]) -> None:
    """The server's greedy tokens under `name` are those of `cases`, for every prompt."""
    assert served_greedy(server, name, cases) == list(cases.values())


LONG_PROMPT = [7, 8, 9]
NUM_LONG = 96
"""Completions of a request that outlasts a publish, on a busy machine too."""
LONG_TOKENS = 240


@dataclass
class LongRequest:
    """What a request answered that runs for seconds."""

    completions: list[list[int]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)


def long_greedy(server: VLLMServer, model: str, num_prompts: int = 1) -> LongRequest:
    """Greedy answers of `model` to `LONG_PROMPT`, as long as the server takes."""
    with server.client() as client:
        found = client.generate(
            [LONG_PROMPT] * num_prompts,
            temperature=0.0,
            max_tokens=LONG_TOKENS,
            model=model,
            generation_kwargs={"ignore_eos": True},
        )
    return LongRequest(found["completion_ids"], found["finish_reasons"])


@contextmanager
def under_way(server: VLLMServer, ask: Callable[[], object]) -> Iterator[None]:
    """Inside the block the server runs the request that `ask` makes; it has ended after it."""
    thread = threading.Thread(target=ask)
    with server.client() as client:
        client.status()  # the connection is there before the request starts
        thread.start()
        try:
            while not client.control("status", timeout_s=5)["running"]:
                assert thread.is_alive(), "the request ended before it was seen"
            yield
        finally:
            thread.join()


@contextmanager
def long_request_under_way(server: VLLMServer, model: str) -> Iterator[LongRequest]:
    """Inside the block a long request of `model` runs; after it, the request has its answers.

    So many completions that it outlasts a publish on a busy machine too.
    """
    request = LongRequest()

    def ask() -> None:
        request.__dict__.update(vars(long_greedy(server, model, NUM_LONG)))

    with under_way(server, ask):
        yield request


@contextmanager
def sync_to(server: VLLMServer, base: Path, mode: str, **settings: Any) -> Iterator[WeightSync]:
    """An open `WeightSync`; drops what it published at the end, so that the next test starts clean."""
    config = SyncConfig(mode=mode, token=server.token, lease_wait_s=0.0, **settings)
    sync = WeightSync(server.url, base_model=base, config=config)
    try:
        sync.open()
        yield sync
    finally:
        drop_all(server, sync)
        sync.close()


def drop_all(server: VLLMServer, sync: WeightSync) -> None:
    """Leave nothing of this policy served."""
    if not server.alive:
        return
    replica = sync.fleet.replicas[0]
    mine = f"{sync.config.policy}@"
    served = [name for name in replica.status().served if name.startswith(mine)]
    if served:
        replica.ensure_channel()
    for name in served:
        replica.drop(name)


def random_adapter(twin: PeftTwin, seed: int = 0) -> Adapter:
    """The twin's adapter after `randomise`."""
    twin.randomise(seed)
    return twin.collector.collect()
