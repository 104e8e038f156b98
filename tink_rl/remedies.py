"""What each error says, where it comes from and what mends it.

The tables of `docs/troubleshooting.md` are made from this and from the classes of `tink_rl.errors`:
`python -m tink_rl.remedies` writes them. "…" stands for a value.
"""

from __future__ import annotations

from tink_rl.errors import LaunchFailed, TinkError, by_code

# code | a piece of its message | cause | cure
TABLE = """
### Training
config_invalid | …: expected one of … | a setting is wrong, or two contradict each other | what the message allows
seam_moved | … … has moved what tink_rl leans on: … | a release of TRL or vLLM without a name that is needed | a [release that was tested](compat.md), which the message names, or a newer tink-rl
unsupported_adapter | … cannot be published: … | no mode can express what the adapter does | change the peft setting that the message names
second_publisher | this model is already published as policy … | two trainers, callbacks or `attach()` on one model | keep one, or `close()` the other
nonfinite_weights | tensor … holds NaN or infinity; training diverged | training diverged | a lower learning rate or clipped gradients; resume from an earlier checkpoint
weight_out_of_range | tensor … holds …, allowed is a magnitude of … | the same: such values corrupt other requests on the server | the same
probe_failed | the server does not serve the policy that is trained | no rounding explains the gap between trainer and server | what the message says; `SyncConfig(probe_tolerance=...)` if the gap is expected
publish_failed | … could not be published: phase …, replica …: … | a publish failed twice; the message ends with the reason | mend the reason, then resume from the checkpoint that the message names
rank_failed | rank … failed: … | another process failed, or did not answer within `ddp_timeout` | look into that rank's log
digest_mismatch | …: they changed on the way; publish again | bytes changed on the way, twice | check the network; `transport="http"` behind TLS
truncated_packet | … bytes arrived, the header of …@… announced … | the transfer was cut | the same
internal | the server answered HTTP …: … | whatever has no code of its own | read the message and the server's log
### Between trainer and server
server_unreachable | The vLLM server can't be reached at … | nothing listens there, or the connection broke | `tink-rl serve MODEL`, or correct the URL
tls_failed | the certificate of … is not trusted (…) | a private authority, another host's certificate, or TLS on one side only | `TINK_CA_FILE`, `--ca-file` or `SyncConfig(ca_file=...)`; else as it says
request_timeout | was not answered within … s; is the server paused or overloaded? | the server is overloaded, paused or hangs | look into the server's log and at `tink-rl status URL`; `SyncConfig(request_timeout_s=...)`
plugin_missing | runs without the tink_rl plugin | a vLLM without our plugin | `tink-rl serve MODEL`, or `pip install tink-rl` in the server's Python
bad_token | the bearer token of this request is missing or wrong | wrong or no token, or vLLM has an `--api-key` of its own | `--token-file` or `TINK_TOKEN_FILE`: the file that `tink-rl serve` named; for vLLM's key `TINK_VLLM_API_KEY_FILE`
protocol_mismatch | protocol … was given, this side speaks … | different releases of tink-rl | install the same one on both sides
bad_request | …; install the same tink-rl release in the trainer and in the server | a request of another form: not from this client | use `WeightSync`, or the same release
base_mismatch | the trainer's base is not the checkpoint that is served (…): … | two bases, other bytes, or a base that was changed in memory (merged, tokens added); or another run's full version in its place | serve the directory that the trainer loads; what was changed: `save_pretrained('NEW_DIR')` before the LoRA is added, serve and load that
lease_held | policy … is published by writer … | another run publishes this name | stop it, or `SyncConfig(policy="other")`
version_taken | was committed with other weights | a version number means one set of weights for the server's life | `WeightSync` counts by itself; by hand: a number above the one that is named
stale_epoch | was closed or replaced; join again | a newer channel of this writer replaced this one | nothing: the next publish joins again
channel_lost | did not end within … s | the other end is gone, or slower than the deadline | `SyncConfig(stage_timeout_s=...)`; `transport="http"` where no port is open
segment_unreachable | no shared memory on this machine | `transport="shm"` without one machine, user and container, or memory is short | `transport="auto"`
unknown_version | does not serve …; it was dropped, replaced by a newer version, or the server was restarted | a name that is not served any more | ask for a current one: `tink-rl status URL`
sampling_refused | vLLM refused the request: … | a field that is never sent, a token or length out of range, or vLLM's own refusal | [what may be asked](trainers.md#what-may-be-asked)
### In the server
mode_unavailable | mode …: this server was started for … | the server was started for another mode, or the mode is taken | `tink-rl serve --mode both`, or a second server
golden_does_not_fit | the golden weights of merged mode need … GiB per worker | merged mode's base weights exceed their budget | `--golden-budget-gib`, `--golden-tier file` or `--mode adapter`; `tink-rl doctor --model DIR` plans it
rank_exceeded | the adapter has rank …, the server's slots take … | a rank above the slots | `tink-rl serve --max-lora-rank N`, or merged mode
unknown_modules | of … modules are not in the base … | the adapter was trained on another model | serve that base
shape_mismatch | was the adapter trained on this base? | the same | the same
dtype_mismatch | tensor … is …, the server's slots take … | published in another dtype than the slots | `WeightSync` casts by itself; by hand: the dtype that the status names
incomplete_group | which vLLM keeps in the same module | full mode: q without k and v, one expert without the others | send every tensor of the group that is named, unchanged ones too
drain_timeout | requests still run after … s, the oldest for … s | requests ran longer than the deadline | `SyncConfig(drain_timeout_s=...)` or `on_running="abort"`
commit_failed | the commit of … failed midway | an error while weights were written | publish again (done once by itself), drop the version, or restart the server
not_ready | this server is NOT READY: … | its weights are in no defined state | publish again, or restart the server
workers_differ | a worker holds digest …, expected … | tensor parallel workers were given different packets | publish again
### Starting a server
launch_failed | vLLM ended while starting | the message has the first exception of its log, or the signal that ended it | as it says; `tink-rl doctor`
port_taken | port … on … is in use | another process listens there | stop it, or `--port N`
model_not_found | model … was not found | no such directory, and not in the hub's cache | correct the path, or `hf download` it
rank_not_allowed | vLLM has kernels for … | a rank that it has none for | the next one, which is named
out_of_memory | out of memory (…); lower --max-model-len or --gpu-memory-utilization | weights, golden weights or KV cache do not fit | `tink-rl doctor --model DIR` shows what takes how much
start_timeout | vLLM was not ready after … s | a slow disk or a busy machine; the message names the stage | `--startup-timeout SECONDS` (600 by default; 1800 with a GPU or a hub id, without downloading)
### Adapters on disk, and the sampling service
lora_path_missing | LoRA path does not exist: … | a wrong path, or a hub id that is not cached | the directory that `save_pretrained()` wrote; `hf download ID`
path_not_allowed | this LoRA path is not allowed | outside the adapter roots, or a link | copy the adapter under a root, or `tink-rl worker --adapter-root DIR`
pickle_refused | a pickle, which can run code and is never opened | only `adapter_model.bin` is there | `tink-rl convert DIR`, or save it again
adapter_files_invalid | give the directory of a PEFT adapter | not a PEFT directory | the one with `adapter_config.json`
adapter_config_invalid | holds no …, nor does a checkpoint or a subfolder in it | no adapter there, several, or another format (MLX, torchtune, sharded state) | the folder that is named, or save the adapter with PEFT
adapter_corrupt | save the adapter again | the weights file is damaged | copy or save it again
adapter_incomplete | holds no tensor of LoRA; save the adapter again | a module has one of its two tensors, or none | save it again
rank_mismatch | its config says rank … | tensors and config do not belong together | save it again
adapter_too_large | register an adapter of lower rank or fewer modules | beyond a limit, which is named | a lower rank, or fewer modules
insufficient_storage | free space | the store, or a checkpoint, cannot be written | free space, or `TINK_STORE_DIR`, or another `output_dir`
store_damaged | move it away and register the adapters again | the store does not hold what was written | as it says
unknown_adapter | no adapter is registered as … | a wrong id, or unregistered | register it; `GET /api/v1/adapters` lists them
name_exists | was registered with other bytes meanwhile | two registrations of one id at once | look at the list, then register again
runtime_loading_off | does not load adapters while it runs | a stock vLLM without runtime loading | `tink-rl serve MODEL --mode adapter`, or `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`
unsupported_by_backend | leave it out, or sample from vLLM | the backend would ignore what was asked for | as it says; [Megatron](sampling_service.md#megatron)
backend_error | serves no model | the backend gave no completion | its log; correct `VLLM_BASE_URL` or `MEGATRON_SERVER_URL`
engine_unavailable | the connection to … broke | the backend does not answer yet | start it; try again
overloaded | try again in … s | the queue is full | wait as `Retry-After` says; `tink-rl worker --max-queued N`, or a second server
deadline_exceeded | the request was not complete after … s | not finished in time | lower `max_tokens`, raise `timeout_s`; the worker's `/readyz` says if the engine is stuck
cancelled | the client went away | it closed its connection | nothing
shutting_down | the worker is stopping | SIGTERM | send it to another worker
request_id_reused | was used for another request | one `request_id`, two bodies | a new request takes a new id
wrong_scope | this token is for sampling | the sample token where the admin's is needed | the file that the worker's first lines name
body_timeout | the body was not complete after … s | a client stopped, or a network did, while it sent | send it again, whole
invalid_json | is not a JSON number | NaN, duplicate keys, or not JSON | send strict JSON
unsupported_media_type | the body is … | compressed, or not JSON by its header | `Content-Type: application/json`
"""
_ROWS = [line.split(" | ") for line in TABLE.strip().splitlines()]


def cure(error: TinkError) -> str:
    """What mends `error`, as plain text."""
    [text] = (row[3] for row in _ROWS if row[0] == error.code)
    return text.replace("`", "")


def tables() -> str:
    """Every code in Markdown tables; `docs/troubleshooting.md` holds them."""
    lines: list[str] = []
    for row in _ROWS:
        if len(row) == 1:
            lines += ["", *row, "", "| code | it says | cause | cure |", "|---|---|---|---|"]
        else:
            code, says, cause, cure = row
            lines.append(f"| {_cell(code)} | `{says}` | {cause} | {cure} |")
    return "\n".join(lines).lstrip() + "\n"


def _cell(code: str) -> str:
    """The code, and in brackets the exit code of `tink-rl serve`."""
    cls = by_code()[code]
    return (
        f"`{code}` ({cls.exit_codes.get(code, 1)})"
        if issubclass(cls, LaunchFailed)
        else f"`{code}`"
    )


def _write_page() -> None:
    from pathlib import Path

    page = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
    head, _, rest = page.read_text().partition("### ")
    page.write_text(head + tables() + "\n## " + rest.partition("\n## ")[2])


if __name__ == "__main__":
    _write_page()
