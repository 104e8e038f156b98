"""Registering, and the ten functions over one default backend."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fake_vllm import FakeVLLM
from tests.policies import PeftTwin
from tests.sampling_rig import BOTH, fake_server, sample
from tests.tiny_models import make_model
from tests.worker_rig import wait_until
from tink_rl import errors, launch, serve_options, vllm_backend
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.sampling import backend as sampling_backend
from tink_rl.sampling import default
from tink_rl.vllm_backend import VLLMBackend


def test_missing_path_and_unreachable_server_keep_their_known_sentences(
    make_backend, model_dir, tmp_path
):
    backend = make_backend(fake_server(model_dir))
    path = tmp_path / "nothing"
    with pytest.raises(ValueError, match="LoRA path does not exist: ") as caught:
        backend.register("math", path)
    assert str(caught.value).splitlines()[0] == f"LoRA path does not exist: {path}"
    lonely = VLLMBackend({"port": 9, "timeout": 0.2, "tink_store_dir": str(tmp_path / "s")})
    for ask in (lonely.connect, lambda: lonely.generate("a"), lambda: lonely.register("a", path)):
        with pytest.raises(ConnectionError) as unreachable:
            ask()
        first, second = str(unreachable.value).splitlines()
        assert first == "The vLLM server can't be reached at http://127.0.0.1:9"
        assert "`tink-rl serve MODEL" in second
    lonely.close()


def test_adapter_needs_a_base_that_can_be_read_or_the_word_of_the_user(
    make_backend, model_dir, adapters, tmp_path
):
    fake = FakeVLLM("org/unknown-model")
    with pytest.raises(errors.BaseMismatch, match="TINK_BASE_MODEL"):
        make_backend(fake).register("math", adapters[0])
    assert (
        make_backend(fake, tink_allow_unverified_base=True).register("a", adapters[0]).version == 1
    )
    assert make_backend(fake, tink_base_model=str(model_dir("qwen3"))).register("b", adapters[0])
    smaller = make_model("qwen3", tmp_path / "small", hidden_size=64)
    with pytest.raises(errors.BaseMismatch):
        make_backend(FakeVLLM(str(smaller))).register("c", adapters[0])


def test_registering_needs_no_server_if_the_base_is_named(model_dir, adapters, tmp_path):
    with VLLMBackend(
        {
            "port": 9,
            "timeout": 0.2,
            "tink_store_dir": str(tmp_path / "s"),
            "tink_base_model": str(model_dir("qwen3")),
        }
    ) as backend:
        assert backend.register("math", adapters[0]).version == 1
        assert backend.info()["reachable"] is False


def test_rank_above_the_servers_slots_is_refused_at_once(make_backend, model_dir, tmp_path):
    twin = PeftTwin(model_dir("qwen3"), r=32, target_modules=["q_proj"])
    twin.model.save_pretrained(tmp_path / "large")
    with pytest.raises(errors.RankExceeded):
        make_backend(fake_server(model_dir)).register("math", tmp_path / "large")
    with pytest.raises(errors.RankExceeded):
        make_backend(fake_server(model_dir), max_lora_rank=64).register("math", tmp_path / "large")


@BOTH
def test_rank_above_what_the_user_allows_is_refused_though_the_server_has_room(
    make_backend, model_dir, adapters, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    assert make_backend(fake).register("math", adapters[0]).version == 1  # of rank 8
    with pytest.raises(errors.RankExceeded):
        make_backend(fake, max_lora_rank=1).register("math", adapters[0])


def test_adapters_that_are_switched_off_are_not_sampled_and_the_servers_own_names_are(
    make_backend, model_dir, adapters
):
    fake = fake_server(model_dir)
    fake.served["policy@17"] = "9f" * 32
    make_backend(fake).register("math", adapters[0])
    off = make_backend(fake, enable_lora=False)
    for name in ("math", "math@1"):
        with pytest.raises(errors.ConfigError, match="VLLM_ENABLE_LORA=true"):
            sample(off, name)
    with pytest.raises(errors.UnknownAdapter):
        sample(off, "nobody")
    assert (sample(off).text, sample(off, "policy@17").text) == ("base", "policy@17")


def test_ids_that_are_taken_switched_off_or_malformed_are_refused(
    make_backend, model_dir, adapters
):
    backend = make_backend(fake_server(model_dir))
    for bad in ("", "../x", "a@1", "x" * 101, "ü", "a\0b"):
        with pytest.raises(errors.BadRequest):
            backend.register(bad, adapters[0])
    with pytest.raises(errors.BadRequest, match="itself serves"):
        backend.register("base", adapters[0])
    with pytest.raises(errors.ConfigError, match="VLLM_ENABLE_LORA"):
        make_backend(fake_server(model_dir), enable_lora=False).register("a", adapters[0])
    with pytest.raises(errors.UnknownAdapter):
        backend.unregister("nobody")


def test_paths_outside_the_adapter_roots_are_refused(make_backend, model_dir, adapters, tmp_path):
    backend = make_backend(fake_server(model_dir), tink_adapter_roots=str(tmp_path))
    with pytest.raises(errors.PathNotAllowed):
        backend.register("math", adapters[0])
    root = adapters[0].parent
    assert backend.register("math", adapters[0], roots=[root]).version == 1


# -- the module's functions ---------------------------------------------------------------------------


def test_functions_are_a_thin_face_over_one_default_object(
    make_backend, model_dir, adapters, monkeypatch
):
    import vllm_backend as seed

    fake = fake_server(model_dir)
    monkeypatch.setattr(default, "_default", make_backend(fake))
    found = seed.register_lora_adapter(adapter_id="my_lora", lora_path=str(adapters[0]))
    assert (found["adapter_id"], found["version"]) == ("my_lora", 1)
    assert seed.list_lora_adapters() == [{"adapter_id": "my_lora", "lora_path": str(adapters[0])}]
    [[answer]] = seed.generate_with_vllm(["Once"], adapter_id="my_lora", max_tokens=1)
    assert answer["text"].startswith("my_lora.") and answer["version"] == 1
    assert seed.get_client_info()["adapters"] == 1
    seed.unregister_lora_adapter("my_lora")
    assert seed.list_lora_adapters() == []
    seed.close_communicator()


def test_initialize_replaces_the_default_only_if_the_server_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(default, "_default", None)
    with pytest.raises(ConnectionError, match=r"can.t be reached at http://127\.0\.0\.1:9\n"):
        vllm_backend.initialize_vllm_client(
            {"port": 9, "timeout": 0.2, "tink_store_dir": str(tmp_path)}
        )
    assert default._default is None


@pytest.fixture
def initialize(monkeypatch, model_dir, tmp_path):
    """`initialize(fake, **settings)`: `initialize_vllm_client` for that server."""
    monkeypatch.setattr(default, "_default", None)
    made = []

    def initialize(fake, **settings):
        def client(settings, token, api_key):
            return VLLMClient(settings.url, token=token, transport=fake.transport())

        monkeypatch.setattr(sampling_backend, "_client", client)
        given = {"tink_store_dir": str(tmp_path / "store"), **settings}
        made.append(vllm_backend.initialize_vllm_client(given))
        return made[-1]

    yield initialize
    for backend in made:
        backend.close()


def test_initialize_with_the_same_settings_keeps_the_backend_and_asks_its_server(
    initialize, model_dir, tmp_path
):
    fake = fake_server(model_dir)
    token = tmp_path / "token"
    token.write_text("t" * 32)
    token.chmod(0o600)
    settings = {"timeout": 0.2, "tink_token_file": str(token)}
    fake.hooks["/health"] = lambda: time.sleep(0.02)
    with ThreadPoolExecutor(8) as pool:
        [first] = set(pool.map(lambda _: initialize(fake, **settings), range(8)))
    assert vllm_backend.default_backend() is first and not first._closed
    fake.away = True
    with pytest.raises(ConnectionError):
        initialize(fake, **settings)
    fake.away = False
    token.write_text("u" * 32)  # the server was started anew
    second = initialize(fake, **settings)
    assert second is not first and first._closed
    second.close()
    assert initialize(fake, **settings) is not second


def test_initialize_closes_the_old_backend_after_its_last_call(initialize, model_dir):
    old_fake, new_fake = fake_server(model_dir), fake_server(model_dir)
    old = initialize(old_fake)
    entered, go = threading.Semaphore(0), threading.Event()

    def hold():
        entered.release()
        assert go.wait(10)

    old_fake.hooks["/v1/completions"] = hold
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(vllm_backend.generate_with_vllm, [[5, 6]], None, 1) for _ in range(8)]
        assert all(entered.acquire(timeout=10) for _ in calls)
        new = initialize(new_fake, port=8123)
        assert vllm_backend.default_backend() is new and not old._closed
        assert vllm_backend.generate_with_vllm([[5, 6]], None, 1)[0][0]["text"] == "base"
        go.set()
        assert all(call.result(10)[0][0]["text"] == "base" for call in calls)
    wait_until(lambda: old._closed)
    assert len(old_fake.generated) == 8 and len(new_fake.generated) == 1


def test_no_call_is_lost_while_the_backend_is_replaced_again_and_again(initialize, model_dir):
    fake = fake_server(model_dir)
    backends = [initialize(fake)]
    done = threading.Event()

    def work(_):
        count = 0
        while not done.is_set():
            assert vllm_backend.generate_with_vllm([[5, 6]], None, 1)[0][0]["text"] == "base"
            count += 1
        return count

    with ThreadPoolExecutor(8) as pool:
        counts = [pool.submit(work, i) for i in range(8)]
        for number in range(20):
            backends.append(initialize(fake, port=8100 + number))
        done.set()
        assert sum(count.result(30) for count in counts) == len(fake.generated) > 0
    wait_until(lambda: all(backend._closed for backend in backends[:-1]))
    assert not backends[-1]._closed


def test_call_that_took_the_old_backend_just_before_it_was_replaced_ends_well(
    initialize, model_dir, monkeypatch
):
    fake = fake_server(model_dir)
    old, take = initialize(fake), vllm_backend.default_backend

    def take_and_be_late():
        found = take()
        if found is old:
            initialize(fake, port=8123)
        return found

    monkeypatch.setattr(default, "default_backend", take_and_be_late)
    assert vllm_backend.generate_with_vllm([[5, 6]], None, 1)[0][0]["text"] == "base"
    wait_until(lambda: old._closed)
    with default.lent() as present:
        initialize(fake, port=8124)
        time.sleep(0.05)
        assert not present._closed
    wait_until(lambda: present._closed)


def test_call_that_never_ends_keeps_an_old_backend_for_its_request_timeout(initialize, model_dir):
    old = initialize(fake_server(model_dir), tink_request_timeout=0.1)
    with old.calls.one():
        initialize(fake_server(model_dir), port=8123)
        wait_until(lambda: old._closed)


def test_serving_without_vllm_says_its_known_sentence_and_what_to_install(model_dir, monkeypatch):
    monkeypatch.setattr(serve_options, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as caught:
        launch.VLLMServer(model_dir("qwen3")).start()
    first, second = str(caught.value).splitlines()
    assert first == "vLLM is not available" and "pip install 'tink-rl[gpu]'" in second


def test_sampling_and_the_worker_need_neither_vllm_nor_trl_nor_peft():
    code = (
        "import sys\nfor m in ('vllm', 'trl', 'peft'): sys.modules[m] = None\n"
        "import vllm_backend, tink_rl.worker.backends.vllm\n"
        "print(callable(vllm_backend.generate_with_vllm), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


def test_known_names_are_all_there():
    names = (
        "initialize_vllm_client generate_with_vllm register_lora_adapter unregister_lora_adapter "
        "list_lora_adapters update_model_weights init_communicator close_communicator "
        "reset_prefix_cache get_client_info"
    )
    import vllm_backend as seed

    for name in names.split():
        assert getattr(seed, name) is getattr(vllm_backend, name)


def test_device_that_is_not_there_is_named(make_backend, model_dir, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = make_backend(fake_server(model_dir))
    for device in ("cuda", "cuda:1", "tpu"):
        with pytest.raises(errors.ConfigError, match=f"device='{device}'.*expected 'cpu'"):
            backend.init_communicator(device)


def test_communicator_that_could_not_be_opened_is_opened_anew(make_backend, model_dir, monkeypatch):
    calls = []

    def open_(sync):
        calls.append("open")
        if calls == ["open"]:
            raise errors.LeaseHeld("somebody else updates the weights")

    monkeypatch.setattr(WeightSync, "open", open_)
    monkeypatch.setattr(WeightSync, "close", lambda sync: calls.append("close"))
    backend = make_backend(fake_server(model_dir))
    with pytest.raises(errors.LeaseHeld):
        backend.init_communicator("cpu")
    assert calls == ["open", "close"] and not backend.info()["communicator"]
    backend.init_communicator("cpu")
    assert calls == ["open", "close", "open"] and backend.info()["communicator"]
    backend.init_communicator("cpu")
    assert len(calls) == 3
