"""Full mode on real servers: whole tensors in, the updated model's greedy tokens out; refusals; slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.policies import PeftTwin, assert_served, served_greedy, sync_to
from tink_rl import errors

pytestmark = pytest.mark.server

SHAPES = ("qwen3", "qwen2", "llama", "gemma3")


class Twin(PeftTwin):
    """A whole model beside a server, changed in every tensor; asked without an adapter."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.whole: Any = self.model.unload()

    def greedy(self, prompts: Any, adapter: bool = True) -> Any:
        """Greedy tokens of the changed model; of the checkpoint with `adapter=False`."""
        model, self.model = self.model, _Plain(self.whole if adapter else _fresh(self.directory))
        try:
            return super().greedy(prompts)
        finally:
            self.model = model

    def shake(self, seed: int, size: float = 0.05) -> None:
        """Add noise to every parameter."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.whole.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * size


class _Plain:
    def __init__(self, model: Any) -> None:
        self.generate = model.generate


def _fresh(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


# The decorator nearest to the function varies slowest: one server start per shape.
@pytest.mark.parametrize("kind", ["model", "pairs"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_the_updated_models_after_every_publish(servers, model_dir, shape, kind):
    server = servers.get(shape, mode="both")
    twin = Twin(model_dir(shape))
    base = server.client().status().base_model
    with sync_to(server, twin.directory, "full", bucket_mib=1) as sync:
        for seed in range(2):
            twin.shake(seed)
            source = twin.whole if kind == "model" else iter(_checkpoint_pairs(twin.whole))
            record = sync.publish_full(source)
            status = server.client().status()
            assert record.digest == status.served[record.name] and status.full == record.name
            assert server.client().models()[0] == record.name
            assert_served(server, record.name, twin.clear_cases())
        for stale in (base, "policy@1"):
            with pytest.raises(errors.UnknownVersion):
                served_greedy(server, stale, [[5, 6]])
        sync.drop_current()
    assert_served(server, base, twin.clear_cases(adapter=False))


def _checkpoint_pairs(model: Any) -> list[tuple[str, torch.Tensor]]:
    """As an exporter yields them: in an order of its own, and the tied head once more at the end."""
    pairs = list(reversed(list(model.named_parameters())))
    return pairs
