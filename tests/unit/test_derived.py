"""What an attention layer makes of a weight is made again with it (vLLM's own MLA, without an engine)."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="the server extra is not installed")
from tests import gpu_layout
from tink_rl.errors import ConfigError, UnsupportedAdapter
from tink_rl.policy.packet import TensorSpec
from tink_rl.server import headers, modules
from tink_rl.server.derived import Derived
from tink_rl.server.folding import Folder
from tink_rl.server.full import FullWriter
from tink_rl.server.layout import Group, Layout
from tink_rl.server.names import Names
from tink_rl.types import SyncMode

HEADS, NOPE, VALUE, LATENT = 2, 16, 16, 512
NAME = "model.kv_b_proj"

_numbers = itertools.count()


class Latent(nn.Module):
    """The part of a DeepSeek model that absorbs `kv_b_proj`."""

    def __init__(self) -> None:
        from vllm.model_executor.layers.attention import MLAAttention
        from vllm.model_executor.layers.linear import ColumnParallelLinear
        from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

        super().__init__()
        self.model = nn.Module()
        width = HEADS * (NOPE + VALUE)
        linear = ColumnParallelLinear(LATENT, width, bias=False, params_dtype=torch.float32)
        self.model.kv_b_proj = linear
        self.model.attention = MLAAttention(
            num_heads=HEADS,
            scale=1.0,
            qk_nope_head_dim=NOPE,
            qk_rope_head_dim=64,
            v_head_dim=VALUE,
            q_lora_rank=None,
            kv_lora_rank=LATENT,
            kv_b_proj=linear,
            prefix=f"attention.{next(_numbers)}",  # vLLM refuses a second layer of one name
            attn_backend=CPUMLABackend,
        )

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            parameter = self.get_parameter(name)
            parameter.weight_loader(parameter, tensor)


@pytest.fixture(scope="module")
def config():
    with gpu_layout.one_rank() as found:
        found.model_config = SimpleNamespace(dtype=torch.float32)
        yield found


@pytest.fixture
def rig(config):
    with gpu_layout.as_on_gpu():
        model = Latent()
        layers = modules.linear_layers(model)
        weights = gpu_layout.load(model, layers)
        model.model.attention.process_weights_after_loading(torch.float32)
        derived = Derived(model, torch.float32)
        golden = gpu_layout.DictGolden(weights)
        folder = Folder(
            layers, golden, vllm_config=config, device=torch.device("cpu"), derived=derived
        )
        yield SimpleNamespace(
            model=model, layers=layers, weights=weights, derived=derived, folder=folder
        )


def check_decode(rig, weight: torch.Tensor) -> None:
    """`W_UK_T` `[heads, nope, latent]` and `W_UV` `[heads, latent, value]` are those of `weight`."""
    attention = rig.model.model.attention
    parts = weight.view(HEADS, NOPE + VALUE, LATENT)
    torch.testing.assert_close(attention.W_UK_T.data, parts[:, :NOPE])
    torch.testing.assert_close(attention.W_UV.data, parts[:, NOPE:].transpose(1, 2))


def test_fold_moves_what_decode_multiplies_by_and_keeps_its_address(rig):
    attention = rig.model.model.attention
    before = (attention.W_UV.data_ptr(), attention.W_UK_T.data_ptr())
    check_decode(rig, rig.weights[NAME])
    tensors = gpu_layout.adapter(rig.layers, "kv_b_proj")
    rig.folder.fold(tensors)
    check_decode(rig, gpu_layout.expected(rig.layers[NAME], rig.weights, tensors))
    rig.folder.fold({})
    check_decode(rig, rig.weights[NAME])
    assert (attention.W_UV.data_ptr(), attention.W_UK_T.data_ptr()) == before


def test_full_version_moves_it_too(rig, config):
    name = f"{NAME}.weight"
    group = Group(key=NAME, modules=(NAME,), names=frozenset([name]))
    entry = SimpleNamespace(shape=tuple(rig.weights[NAME].shape))
    writer = FullWriter(
        rig.model,
        Layout({name: entry}, [group]),
        vllm_config=config,
        dtype=torch.float32,
        device=torch.device("cpu"),
        derived=rig.derived,
    )
    fresh = torch.randn_like(rig.weights[NAME])
    writer.begin()
    assert writer.write({name: fresh}) == 1
    check_decode(rig, fresh)


def test_slot_for_it_is_refused_because_decode_would_not_use_it(rig):
    owned = rig.derived.owned(rig.layers.values())
    assert owned == {NAME: "MLAAttention"}
    names = Names(rig.model, rig.layers)
    out, width = names.find(NAME)[0].shape
    specs = (
        TensorSpec(name=f"{NAME}.lora_A.weight", shape=(4, width), dtype="float32", offset=0),
        TensorSpec(
            name=f"{NAME}.lora_B.weight", shape=(out, 4), dtype="float32", offset=16 * width
        ),
    )
    header = SimpleNamespace(mode=SyncMode.ADAPTER, rank=4, tensors=specs)
    with pytest.raises(UnsupportedAdapter, match=r"kv_b_proj.*leave them out of target_modules"):
        headers.check_header(header, names, max_lora_rank=8, refused=owned)
    headers.check_header(header, names, max_lora_rank=8)


def test_model_of_which_something_old_would_stay_is_refused_for_writing(rig, monkeypatch):
    attention = rig.model.model.attention
    rig.derived.check()
    monkeypatch.setattr(attention, "is_amx_bmm_enabled", True)
    with pytest.raises(ConfigError, match=r"AMX_MLA.*--attention-backend CPU_MLA"):
        rig.derived.check()
    monkeypatch.setattr(attention, "is_amx_bmm_enabled", False)
    elsewhere = lambda dtype: setattr(attention, "W_UK_T", nn.Parameter(attention.W_UK_T.clone()))  # noqa: E731
    monkeypatch.setattr(attention, "process_weights_after_loading", elsewhere)
    with pytest.raises(ConfigError, match="makes 'W_UK_T' of its weights at a new address"):
        rig.derived.check()


def test_model_with_a_hook_of_its_own_after_loading_is_refused_for_writing(rig, monkeypatch):
    hook = lambda self: None  # noqa: E731
    monkeypatch.setattr(Latent, "process_weights_after_loading", hook, raising=False)
    with pytest.raises(ConfigError, match=r"Latent makes further tensors.*--mode adapter"):
        rig.derived.check()
