"""A fake server and one sample of it, for the tests of sampling from registered adapters."""

from __future__ import annotations

import pytest

from tests.fake_vllm import FakeVLLM


def fake_server(model_dir, **options):
    return FakeVLLM(str(model_dir("qwen3")), **options)


BOTH = pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "stock"])


def sample(backend, name=None):
    [[found]] = backend.generate([[5, 6]], name, max_tokens=1)
    return found
