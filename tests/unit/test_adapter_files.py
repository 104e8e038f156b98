"""Adapters as people have them: names, folders, copies of the base, thousands of modules, other formats."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import (
    BASE,
    CONFIG,
    PREFIX,
    SHAPES,
    WEIGHTS,
    config_of,
    tensors_of,
    write_adapter,
)
from tests.hub_cache import cache_snapshot
from tests.refusals import refused
from tink_rl import errors
from tink_rl.adapters import normalised
from tink_rl.adapters.convert import convert
from tink_rl.adapters.store import AdapterStore
from tink_rl.cli import main
from tink_rl.policy import tensor_file
from tink_rl.policy.adapter import from_peft_dir
from tink_rl.policy.patterns import Pattern
from tink_rl.policy.peft_dir import open_peft_dir
from tink_rl.policy.shapes import BaseShapes
from tink_rl.tools.doctor.adapter import check_adapter
from tink_rl.tools.doctor.finding import Level
from tink_rl.tools.export import export

Q0 = "model.layers.0.self_attn.q_proj"


def named(change):
    """The right tensors, under changed names."""
    return {change(name): tensor for name, tensor in tensors_of().items()}


def same(adapter):
    expected = {name.removeprefix(PREFIX): tensor for name, tensor in tensors_of().items()}
    found = {n: t / (2 if "lora_B" in n else 1) for n, t in adapter.tensors.items()}
    return set(found) == set(expected) and all(
        torch.equal(found[n], t) for n, t in expected.items()
    )


# -- names (cases 1 and 2) --------------------------------------------------------------------------

LEFT_IN = {
    "the adapter's name": (lambda n: n.replace(".weight", ".default.weight"), "'default'"),
    "another adapter's name": (lambda n: n.replace(".weight", ".policy.weight"), "'policy'"),
    "compile, in front": (lambda n: f"_orig_mod.{n}", "torch.compile"),
    "compile, after the prefix": (lambda n: n.replace(PREFIX, PREFIX + "_orig_mod."), "torch.compile"),
    "compile, in each layer": (lambda n: n.replace("layers.0.", "layers.0._orig_mod."), "torch.compile"),
    "DDP": (lambda n: f"module.{n}", "DDP"),
    "DDP of compile": (lambda n: f"module._orig_mod.{n}", "DDP"),
    "checkpointing": (
        lambda n: n.replace(".0.", ".0._checkpoint_wrapped_module."), "activation checkpointing",
    ),
    "FSDP": (lambda n: n.replace(".1.", ".1._fsdp_wrapped_module."), "FSDP"),
    "FSDP, in front": (lambda n: n.replace(PREFIX, PREFIX + "_fsdp_wrapped_module."), "FSDP"),
    "the prefix twice": (lambda n: PREFIX + n, "twice"),
    "an adapter's name with dots": (lambda n: n.replace(".weight", ".sft.v1.weight"), "'sft.v1'"),
    "Lightning's module": (lambda n: f"_forward_module.model.{n}", "'_forward_module.model.'"),
    "a value head's": (lambda n: f"pretrained_model.{n}", "'pretrained_model.'"),
    "all at once": (
        lambda n: f"module._orig_mod.{PREFIX}_fsdp_wrapped_module."
        + n.removeprefix(PREFIX).replace(".weight", ".sft.weight"), "'sft'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("base", [BASE, None], ids=["known base", "unverified base"])
@pytest.mark.parametrize("case", LEFT_IN)
def test_what_a_writer_left_in_the_names_is_taken_out_and_said(store, tmp_path, caplog, case, base):
    change, word = LEFT_IN[case]
    source = write_adapter(tmp_path / "a", tensors=named(change))
    adapter = store.read(store.add(source, base=base).digest)
    assert same(adapter)
    (line,) = [r.getMessage() for r in caplog.records if "taken out of the names" in r.getMessage()]
    assert word in line


def test_ddps_wrapper_inside_pefts_is_taken_out_only_where_the_base_tells(store, tmp_path):
    source = write_adapter(
        tmp_path / "a", tensors=named(lambda n: n.replace(PREFIX, f"{PREFIX}module."))
    )
    assert same(store.read(store.add(source, base=BASE).digest))
    with pytest.raises(
        errors.UnsupportedAdapter, match=r"'module\.', which is DDP's wrapper or a module"
    ):
        store.add(source)


def test_what_the_base_itself_is_called_stays(store, tmp_path):
    shapes = {f"module.{name}": shape for name, shape in SHAPES.items()}
    base = BaseShapes(name="with-a-module", shapes=shapes)
    source = write_adapter(tmp_path / "a", tensors=tensors_of(shapes=shapes))
    stored = store.add(source, base=base)
    assert set(stored.modules) == set(shapes) == set(store.read(stored.digest).modules)


def test_two_adapters_in_one_file_are_named(store, tmp_path):
    both = named(lambda n: n.replace(".weight", ".a.weight" if "layers.0" in n else ".b.weight"))
    source = write_adapter(tmp_path / "a", tensors=both)
    with pytest.raises(
        errors.UnsupportedAdapter, match=r"adapters \['a', 'b'\].*selected_adapters"
    ):
        store.add(source, base=BASE)


def test_exported_adapter_bears_pefts_names(tmp_path):
    config = config_of(base_model_name_or_path="acme/base")
    source = write_adapter(
        tmp_path / "a", config=config, tensors=named(lambda n: n.replace(".weight", ".sft.weight"))
    )
    done = export(source, tmp_path / "out")
    assert set(load_file(done.path / WEIGHTS)) == set(tensors_of())


# -- folders (cases 13b, 22, 24) --------------------------------------------------------------------


@pytest.mark.parametrize(
    "places",
    [
        ["sft"],
        ["sft", "ref"],
        ["sft", "reference", "checkpoint-4/sft"],
        ["checkpoint-4/sft", "checkpoint-4/ref", "checkpoint-2/sft"],
        ["checkpoint-4", "checkpoint-10/sft"],
        ["", "ref", "checkpoint-4/sft"],
    ],
    ids=str,
)
def test_adapter_of_a_run_is_found_and_never_its_reference(store, tmp_path, places):
    right = max(places, key=lambda p: (p == "", p == "sft", "sft" in p and "10" in p, "4/sft" in p))
    for place in places:
        write_adapter(tmp_path / "run" / place, seed=0 if place == right else 1)
    (tmp_path / "run" / "logs").mkdir()
    assert same(store.read(store.add(tmp_path / "run", base=BASE).digest))
    assert same(store.read(store.add(tmp_path / "run", roots=[tmp_path], base=BASE).digest))
    assert same(from_peft_dir(tmp_path / "run"))
    done = export(tmp_path / "run", tmp_path / "out", base="acme/base")
    assert torch.equal(load_file(done.path / WEIGHTS)[f"{PREFIX}{Q0}.lora_A.weight"],
                       tensors_of()[f"{PREFIX}{Q0}.lora_A.weight"])  # fmt: skip
    assert not [f for f in check_adapter(tmp_path / "run") if f.level is Level.BLOCKER]


@pytest.mark.parametrize("roots", [None, "below a root"])
def test_several_named_adapters_are_refused_by_their_names(tmp_path, roots):
    for name in ("math", "code", "ref"):
        write_adapter(tmp_path / "run" / name)
    given = {"roots": [tmp_path]} if roots else {}
    words = rf"holds 2 adapters: code, math; give one of them, such as {tmp_path}/run/code"
    with (
        pytest.raises(errors.AdapterConfigInvalid, match=words),
        open_peft_dir(tmp_path / "run", **given),
    ):
        pass


@pytest.mark.parametrize("roots", [False, True])
@pytest.mark.parametrize("place", ["global_step_20/actor/lora_adapter", "v0-2026/checkpoint-10"])
def test_adapter_deep_in_another_trainers_run_is_named(store, tmp_path, place, roots):
    write_adapter(tmp_path / "run" / place)
    with pytest.raises(
        errors.AdapterConfigInvalid, match=f"below it lies .*/run/{place}; give that"
    ):
        store.add(tmp_path / "run", roots=[tmp_path] if roots else None)


def test_newest_checkpoint_without_an_adapter_is_not_passed_over_in_silence(tmp_path, caplog):
    write_adapter(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-4").mkdir()
    with open_peft_dir(tmp_path) as found:
        assert found.where == f"{tmp_path}/checkpoint-2/{WEIGHTS}"
    assert "no adapter in ['checkpoint-4'], so checkpoint-2" in caplog.text


def test_reference_alone_is_taken_only_if_it_is_named(tmp_path):
    write_adapter(tmp_path / "run" / "ref")
    with pytest.raises(errors.AdapterConfigInvalid, match=r"reference adapter ref/ only"):
        from_peft_dir(tmp_path / "run")
    assert same(from_peft_dir(tmp_path / "run" / "ref"))


@pytest.mark.parametrize("spelling", ["{}/", "{}//", f"{{}}/{CONFIG}", f"{{}}/{WEIGHTS}", "{}/./"])
def test_other_spellings_of_a_folder_are_that_folder(tmp_path, spelling):
    path = spelling.format(write_adapter(tmp_path / "a"))
    assert same(from_peft_dir(path))
    with open_peft_dir(path, roots=[tmp_path]) as adapter:
        assert len(adapter.modules) == 3


@pytest.fixture
def cached(tmp_path, monkeypatch):
    source = write_adapter(tmp_path / "lora" / "sft").parent
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return cache_snapshot(tmp_path / "hub", "acme/math-lora", source, "main")


def test_hub_id_of_a_cached_adapter_is_that_adapter(cached, store, tmp_path):
    assert same(from_peft_dir("acme/math-lora"))
    assert store.add("acme/math-lora").digest == store.add(cached).digest
    with pytest.raises(errors.AdapterPathMissing, match="hf download acme/other"):
        from_peft_dir("acme/other")
    with pytest.raises(
        errors.PathNotAllowed, match=rf"hf download acme/math-lora --local-dir {tmp_path}"
    ):
        store.add("acme/math-lora", roots=[tmp_path])


def test_links_of_a_hub_cache_below_a_root_lead_to_its_own_blobs_only(cached, store, tmp_path):
    for roots in ([tmp_path], [tmp_path / "hub"], [cached.parents[1]]):
        assert same(store.read(store.add(cached, roots=roots).digest))
    with pytest.raises(errors.PathNotAllowed, match="leads out of the adapter root"):
        store.add(cached / "sft", roots=[cached])
    link = cached / "sft" / WEIGHTS
    outside = shutil.copy(link, tmp_path / "blob12345")
    link.unlink()
    for target in (outside, "../../../../../blob12345", "../../../blobs/../../../blob12345"):
        link.symlink_to(target)
        with pytest.raises(errors.PathNotAllowed, match="leads out of the adapter root"):
            store.add(cached, roots=[tmp_path])
        link.unlink()


# -- thousands of modules (cases 3 and 3b) ----------------------------------------------------------


def experts(layers, each):
    kinds = ("gate_proj", "up_proj", "down_proj")
    names = [
        f"model.layers.{i}.mlp.experts.{j}.{kind}"
        for i in range(layers)
        for j in range(each)
        for kind in kinds
    ]
    return dict.fromkeys(names, (1, 1))


@pytest.mark.parametrize(
    ("layers", "each"),
    [
        pytest.param(16, 64, id="OLMoE"),
        pytest.param(48, 128, id="Qwen3-30B-A3B", marks=pytest.mark.long),
    ],
)
def test_adapter_on_every_expert_is_read_back(store, tmp_path, layers, each):
    shapes = experts(layers, each)
    source = write_adapter(
        tmp_path / "a", config=config_of(1), tensors=tensors_of(1, shapes=shapes)
    )
    stored = store.add(source, base=BaseShapes(name="moe", shapes=shapes))
    assert len(store.read(stored.digest).modules) == 3 * layers * each


@pytest.mark.parametrize("where", ["header", "config"])
def test_what_our_own_reader_would_not_take_is_refused_as_a_limit(
    store, tmp_path, monkeypatch, where
):
    shapes = experts(2, 8)
    source = write_adapter(
        tmp_path / "a", config=config_of(1), tensors=tensors_of(1, shapes=shapes)
    )
    if where == "header":
        monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", 1000)
        words = "a header of .* at most 1000 are read"
    else:
        monkeypatch.setattr(normalised, "MAX_CONFIG_BYTES", 1000)
        words = "names of its 48 modules"
    with refused("adapter_too_large", match=words) as caught:
        store.add(source)
    assert "copy it again" not in str(caught.value) and store.digests() == []


def test_rank_and_alpha_of_a_thousand_modules_are_pefts(store, tmp_path):
    shapes = {
        f"model.layers.{i}.{kind}": (1, 1)
        for i in range(126)
        for kind in ("q", "k", "v", "o", "g", "u", "d")
    }
    ranks = {name: 1 + i % 2 for i, name in enumerate(shapes)}
    alphas = {name: 1.0 + i % 5 for i, name in enumerate(shapes)}
    tensors = {}
    for name, rank in ranks.items():
        tensors |= tensors_of(rank, shapes={name: (1, 1)})
    config = config_of(4, rank_pattern=ranks, alpha_pattern=alphas, target_modules=list(shapes))
    with open_peft_dir(write_adapter(tmp_path / "a", config=config, tensors=tensors)) as adapter:
        assert {m.name: m.rank for m in adapter.modules} == ranks
        assert {m.name: m.scaling for m in adapter.modules} == {
            name: alphas[name] / ranks[name] for name in shapes
        }


KEYS = [
    "q_proj", "layers.1.mlp", "layers.1.mlp.up_proj", "^model.layers.0.q_proj", r"model\.layers\.1\.q_proj",
    "layers.*.v_proj", "model.layers.0.v_proj$", "layers.1.q_pro.", "ayers.1.q_proj", "odel.x", "[qk]_proj",
    "layers_1.q_proj", r"^layers\.0\.q_proj$", "1.q_proj",
]  # fmt: skip
MODULES = [
    "model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.11.q_proj", "model.layers.1.mlp.up_proj",
    "layers.0.q_proj", "q_proj", "model.layers.0.v_proj", "model.layersX1.q_proj", "xq_proj", "k_proj",
]  # fmt: skip


@pytest.mark.parametrize("turn", range(len(KEYS)))
def test_patterns_are_looked_up_as_peft_does(turn):
    from peft.utils.other import get_pattern_key

    keys = KEYS[turn:] + KEYS[:turn]
    values = {key: i for i, key in enumerate(keys)}
    pattern = Pattern({"rank_pattern": values}, "rank_pattern", None, "here")
    for module in MODULES:
        assert pattern.of(module) == values.get(get_pattern_key(keys, module)), module


# -- copies of the base's embedding and head (case 4) -----------------------------------------------


@pytest.fixture
def on_base(model_dir, tmp_path):
    """Writes an adapter of the tiny Qwen3 with whole tensors beside it."""
    base = model_dir("qwen3")
    own = load_file(base / "model.safetensors")

    def write(**beside):
        shapes = {Q0: (128, 128)}
        extra = {f"{PREFIX}{k.replace('__', '.')}.weight": t for k, t in beside.items()}
        config = config_of(target_modules=["q_proj"], base_model_name_or_path=str(base))
        return write_adapter(
            tmp_path / "a", config=config, tensors={**tensors_of(shapes=shapes), **extra}
        )

    return base, own["model.embed_tokens.weight"], own["lm_head.weight"], write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchanged_copies_of_the_base_are_let_through(on_base, store, tmp_path, dtype):
    base, embedding, head, write = on_base
    source = write(model__embed_tokens=embedding.to(dtype), lm_head=head.to(dtype))
    shapes = BaseShapes.from_model_dir(base)
    assert store.add(source, base=shapes).modules == (Q0,)
    assert not [f for f in check_adapter(source) if f.level is Level.BLOCKER]
    export(source, tmp_path / "out", merged=True)
    with pytest.raises(errors.UnsupportedAdapter, match="save_embedding_layers=False"):
        store.add(source)


def test_larger_vocabulary_is_said_with_both_numbers(on_base, store, tmp_path):
    base, embedding, head, write = on_base
    source = write(
        model__embed_tokens=torch.cat([embedding, embedding[:2]]),
        lm_head=torch.cat([head, head[:2]]),
    )
    words = "has 66 rows, the base's vocabulary has 64: the vocabulary was extended"
    with pytest.raises(errors.BaseMismatch, match=words):
        store.add(source, base=BaseShapes.from_model_dir(base))
    with pytest.raises(errors.BaseMismatch, match=words):
        export(source, tmp_path / "out", merged=True)
    assert "66 rows" in check_adapter(source)[0].what


def test_trained_embedding_beside_the_adapter_is_never_dropped(on_base, store, tmp_path):
    base, embedding, _, write = on_base
    changed = embedding.clone()
    changed[3, 5] += 0.01
    source = write(model__embed_tokens=changed)
    with pytest.raises(errors.UnsupportedAdapter, match="it was trained"):
        store.add(source, base=BaseShapes.from_model_dir(base))
    with pytest.raises(errors.UnsupportedAdapter, match="it was trained"):
        export(source, tmp_path / "out", merged=True)


# -- what is no PEFT adapter (cases 5, 6, 8b) --------------------------------------------------------

Q0_A, Q0_B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
EXPERT = f"{PREFIX}model.layers.0.mlp.experts.w1"


def with_experts(shape_a, shape_b):
    return {
        **tensors_of(),
        f"{EXPERT}.lora_A.weight": torch.ones(shape_a),
        f"{EXPERT}.lora_B.weight": torch.ones(shape_b),
    }


NOT_PEFT = {
    "Tinker's head": (
        {**tensors_of(), f"{PREFIX}model.unembed_tokens.lora_A.weight": torch.ones(4, 16)},
        "Tinker's unembed_tokens.*build_lora_adapter.*train_unembed=False",
    ),
    "Tinker's experts": (with_experts((8, 4, 16), (8, 24, 4)), "one matrix per expert.*Tinker.*build_lora"),
    "Tinker's empty experts": (with_experts((0, 4, 16), (0, 24, 4)), "one matrix per expert.*Tinker"),
    "Tinker's empty pair": (with_experts((0,), (0,)), "empty, as a raw Tinker export"),
    "not gathered": (
        {**tensors_of(), Q0_A: torch.ones(0), Q0_B: torch.ones(0)}, "ZeRO-3 or FSDP gather the parameters",
    ),
    "MLX's tensors": ({f"{Q0}.lora_a": torch.ones(16, 4)}, "MLX's format.*mlx_lm.fuse"),
    "torchtune's tensors": (
        {"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 16)}, "torchtune's own.*FullModelHFCheckpointer",
    ),
    "kohya's": ({"lora_unet_x.lora_down.weight": torch.ones(4, 4)}, "kohya's format"),
    "untransposed": ({Q0_A: torch.ones(16, 4), Q0_B: torch.ones(4, 24)}, "its config says rank 4"),
    "DoRA": (
        {**tensors_of(), f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(24)}, "DoRA, which the config",
    ),
    "raw state dict": (
        {**tensors_of(), f"{PREFIX}{Q0}.base_layer.weight": torch.ones(24, 16)}, "raw state dict; save the",
    ),
    "trained modules, raw": (
        {**tensors_of(), f"{PREFIX}model.norm.modules_to_save.default.weight": torch.ones(16)},
        "raw state dict with trained modules",
    ),
    "a norm": ({**tensors_of(), f"{PREFIX}model.norm.weight": torch.ones(16)}, "whole tensor and no LoRA"),
    "an embedding": (
        {**tensors_of(), f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 64)},
        "LoRA on an embedding; leave it out of target_modules",
    ),
    "the head": (
        {**tensors_of(), f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 16)}, "LoRA on the head; leave",
    ),
    "nothing": ({}, "holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_PEFT)
def test_what_is_no_lora_of_a_linear_layer_is_named_as_what_it_is(store, tmp_path, case):
    tensors, words = NOT_PEFT[case]
    source = write_adapter(tmp_path / "a", tensors=tensors)
    with pytest.raises(errors.TinkError, match=words):
        store.add(source, base=BASE)
    found = check_adapter(source)
    # Of the live model these two go in full mode.
    assert any(f.level is Level.BLOCKER for f in found) == (
        case not in ("an embedding", "the head")
    )
    assert all(f.fix != "train without that feature" for f in found)


MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 16, "model": "x"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({CONFIG: json.dumps(MLX), "adapters.safetensors": ""}, "mlx_lm.lora.*mlx_lm.fuse"),
        ({"adapters.safetensors": ""}, "MLX's format"),
        ({"adapter_0.pt": ""}, "torchtune's own format"),
        (
            {"config.json": "{}", "model.safetensors": ""},
            "is a whole model, no adapter.*tink-rl serve",
        ),
        ({"global_step100": None}, "DeepSpeed or FSDP"),
        (
            {CONFIG: json.dumps(config_of(peft_type="ADALORA", rank_pattern={"q": [True]}))},
            "AdaLoRA",
        ),
        ({CONFIG: json.dumps(config_of())}, "has no adapter_model.safetensors"),
        ({"notes.txt": ""}, r"holds no adapter_config.json.*found \['notes.txt'\]"),
    ],
    ids=lambda value: str(sorted(value))[:50] if isinstance(value, dict) else value[:20],
)
def test_folder_of_another_kind_is_named_as_what_it_is(store, tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text)
    for roots in (None, [tmp_path.parent]):
        with pytest.raises(errors.TinkError, match=words):
            AdapterStore(tmp_path.parent / "store").add(tmp_path, roots=roots, base=BASE)
    assert check_adapter(tmp_path)[0].level is Level.BLOCKER


def everybody_says(source, words, store):
    """The same of registering, looking at and exporting the adapter `source`."""
    for ask in (lambda: store.add(source), lambda: export(source, source.parent / "out", base="b")):
        with pytest.raises(errors.TinkError, match=words):
            ask()
    (finding,) = check_adapter(source)
    assert finding.level is Level.BLOCKER


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS.*git lfs pull",
        ),
        (b"<!doctype html><html>Please log in</html>", "a web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"PK\x03\x04" + bytes(64), "a pickle of torch.save"),
        (bytes(4096), "begins with zeros"),
        (b"", "has 0 bytes"),
    ],
    ids=["lfs", "page", "gguf", "pickle", "zeros", "empty"],
)
def test_file_that_is_no_safetensors_is_named_as_what_it_is(store, tmp_path, content, words):
    source = write_adapter(tmp_path / "a")
    (source / WEIGHTS).write_bytes(content)
    everybody_says(source, words, store)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "it is empty"),
        (b'{"r": 4,}', r"not strict JSON: .*line 1 column"),
        (b'{"r": NaN}', "NaN is not a JSON number"),
        ('{"r": 4}'.encode("utf-16"), "not in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
    ids=["empty", "comma", "nan", "utf16", "lfs"],
)
def test_config_that_is_no_json_says_why(store, tmp_path, text, words):
    source = write_adapter(tmp_path / "a")
    (source / CONFIG).write_bytes(text)
    everybody_says(source, words, store)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_model-00001-of-00002.safetensors"], "holds shards"),
        (["pytorch_lora_weights.safetensors"], "but pytorch_lora_weights.safetensors"),
        (["pytorch_model.bin"], r"but pytorch_model\.bin.*tink-rl convert"),
        (["adapter_model.bin"], "tink-rl convert"),
    ],
)
def test_other_files_of_weights_are_named(store, tmp_path, names, words):
    source = write_adapter(tmp_path / "a")
    (source / WEIGHTS).unlink()
    for name in names:
        (source / name).write_bytes(b"x")
    everybody_says(source, words, store)


def test_mark_that_windows_puts_before_a_config_is_read_over(store, tmp_path):
    source = write_adapter(tmp_path / "a")
    (source / CONFIG).write_bytes(b"\xef\xbb\xbf" + (source / CONFIG).read_bytes())
    assert same(store.read(store.add(source, base=BASE).digest))


def test_config_without_rank_or_alpha_says_so(store, tmp_path):
    for name in ("r", "lora_alpha"):
        config = {key: value for key, value in config_of().items() if key != name}
        with pytest.raises(errors.AdapterConfigInvalid, match=f"no {name}, expected"):
            store.add(write_adapter(tmp_path / name, config=config))


def test_adapter_of_a_model_without_its_head_is_told_from_one_of_another_base(store, tmp_path):
    source = write_adapter(
        tmp_path / "a", tensors=named(lambda n: n.replace("model.model.", "model."))
    )
    with pytest.raises(
        errors.UnknownModules, match=rf"'model\.{Q0[6:].split('.self')[0]}.*AutoModel"
    ):
        store.add(source, base=BASE)


def test_empty_pickle_is_refused_and_one_of_a_raw_state_dict_ends_in_an_adapter(
    store, tmp_path, capsys, forked_conversions
):
    source = write_adapter(tmp_path / "run" / "sft")
    (source / WEIGHTS).unlink()
    torch.save({}, source / "adapter_model.bin")
    assert main(["convert", str(tmp_path / "run")]) != 0
    said = capsys.readouterr().err
    assert "holds no tensor" in said and "delete" not in said and not (source / WEIGHTS).exists()
    torch.save(
        named(lambda n: n.replace(".weight", ".default.weight")), source / "adapter_model.bin"
    )
    assert convert(tmp_path / "run").num_tensors == 6
    assert same(store.read(store.add(tmp_path / "run", base=BASE).digest))
