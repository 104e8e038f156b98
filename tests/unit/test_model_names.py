"""What a `model_id` means beside the names that a server itself serves."""

from __future__ import annotations

import pytest

from tests.sampling_rig import fake_server, sample
from tink_rl import errors


def test_trainers_versions_and_static_names_can_be_sampled(make_backend, model_dir):
    fake = fake_server(model_dir)
    fake.served["policy@17"] = "9f" * 32
    backend = make_backend(fake)
    found = sample(backend, "policy@17")
    assert (found.text, found.version, found.digest) == ("policy@17", 17, "9f" * 32)
    fake.served["policy@18"] = fake.served.pop("policy@17")
    assert sample(backend, "policy@18").version == 18
    with pytest.raises(errors.UnknownAdapter, match="policy@17"):
        sample(backend, "policy@17")


def test_merged_policy_means_that_there_is_no_base(make_backend, model_dir):
    fake = fake_server(model_dir)
    fake.served["policy@3"], fake.merged = "9f" * 32, "policy@3"
    backend = make_backend(fake)
    with pytest.raises(errors.ModeUnavailable, match="policy@3 is folded into the weights"):
        sample(backend)
    assert sample(backend, "policy@3").version == 3


def test_whole_weights_that_were_published_are_the_base(make_backend, model_dir):
    fake = fake_server(model_dir)
    backend = make_backend(fake)
    assert (sample(backend).text, sample(backend).version) == ("base", None)
    fake.served["policy@4"], fake.full = "9f" * 32, "policy@4"
    found = sample(backend)
    assert (found.text, found.version, found.digest) == ("policy@4", 4, "9f" * 32)


def test_server_names_of_other_registrations_are_not_model_ids(make_backend, model_dir, adapters):
    fake = fake_server(model_dir)
    backend = make_backend(fake)
    backend.register("math", adapters[0])
    name = sample(backend, "math").text
    with pytest.raises(errors.UnknownAdapter):
        sample(backend, name)


def test_adapter_that_took_the_name_of_the_base_while_the_server_was_away_is_refused(
    make_backend, model_dir, adapters
):
    fake = fake_server(model_dir)
    backend = make_backend(fake, tink_base_model=str(model_dir("qwen3")))
    fake.away = True
    for name in ("base", "static"):
        backend.register(name, adapters[0])
    fake.away = False
    fake.served["static"] = "9f" * 32
    for process in (backend, make_backend(fake)):
        for name in ("base", "static"):
            with pytest.raises(errors.AdapterConflict, match=f"unregister_lora_adapter.'{name}'"):
                sample(process, name)
        with pytest.raises(errors.AdapterConflict):
            process.resolver.resolve("base")
    for name in ("base", "static"):
        with pytest.raises(errors.AdapterConflict):
            make_backend(fake).generate("text, so that nothing was known", name, max_tokens=1)
    assert fake.generated == [] and set(fake.served) == {"static"}
    assert sample(backend).text == "base"
    for name in ("base", "static"):
        backend.unregister(name)
        assert sample(backend, name).text == name
