"""A running server: does it have the plugin, and is it set up for training?"""

from __future__ import annotations

from urllib.parse import urlsplit

from tink_rl import __version__, errors
from tink_rl.loopback import is_local
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.remedies import cure
from tink_rl.tools.doctor.finding import Finding, blocker, note, ok, warning
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.types import PROTOCOL_VERSION, ServerState, ServerStatus

_MAX_CLOCK_S = 5.0


def check_server(
    client: SamplingClient, *, base_model: str | None = None
) -> tuple[list[Finding], ServerStatus | None]:
    """Findings about the server behind `client`, and its status if it gave one.

    Args:
        client: With the token of the control routes.
        base_model: The base that the trainer will load: must be the one that is served.
    """
    try:
        status = client.status()
    except errors.TinkError as error:
        return [blocker("server", error.message, cure(error))], None
    findings = [ok("server", f"{client.base_url}: plugin present, base {status.base_model!r}")]
    findings += check_status(status)
    findings += [_transport(client.base_url), _clock(client)]
    if base_model is not None:
        findings.append(_base(status, base_model))
    return findings, status


def check_status(status: ServerStatus) -> list[Finding]:
    """What the status says. Pure."""
    findings = []
    if status.state is ServerState.NOT_READY or status.reason:
        error = errors.NotReady(f"{status.state}: {status.reason}")
        findings.append(blocker("state", error.message, cure(error)))
    if status.protocol != PROTOCOL_VERSION:
        text = f"protocol {status.protocol}, ours is {PROTOCOL_VERSION}"
        findings.append(
            blocker("release", text, f"pip install tink-rl=={__version__} on both sides")
        )
    theirs = status.versions.get("tink-rl", "unknown")
    if theirs != __version__:
        text = f"the server runs tink-rl {theirs}, here is {__version__}"
        findings.append(
            warning("release", text, f"pip install tink-rl=={__version__} on both sides")
        )
    findings.append(ok("modes", f"{', '.join(status.modes)}; served now: {_served(status)}"))
    if "adapter" in status.modes:
        text = (
            f"{status.max_loras} slots of rank up to {status.max_lora_rank}, {status.adapter_dtype}"
        )
        findings.append(ok("slots", text))
    findings.append(_dtype(status))
    findings.append(_logprobs(status))
    if status.golden:
        tier, size = status.golden["tier"], status.golden["bytes"] / 2**20
        findings.append(ok("golden weights", f"{size:.1f} MiB per worker on tier {tier!r}"))
    return findings


def _served(status: ServerStatus) -> str:
    return ", ".join(status.served) or "the base"


def _dtype(status: ServerStatus) -> Finding:
    text = f"weights {status.dtype} on {status.device}, up to {status.max_model_len} tokens"
    if status.amx is False and status.dtype == "bfloat16" and status.device == "cpu":
        text += "; the kernel keeps AMX's tile registers from it, which bf16 attention uses"
        return blocker("dtype", text, "--dtype float32, or a kernel or sandbox that grants them")
    if status.dtype == "float32" and status.device != "cpu":
        return warning("dtype", text, "--dtype bfloat16 halves memory and time on a GPU")
    if status.dtype != "float32" and "merged" in status.modes:
        return note("dtype", f"{text}; merged mode rounds W + BA to it, auto measures by how much")
    return ok("dtype", text)


def _logprobs(status: ServerStatus) -> Finding:
    if status.logprobs_mode != "processed_logprobs":
        return blocker(
            "logprobs",
            f"{status.logprobs_mode}: without temperature in them the importance ratio is biased",
            "restart with --logprobs-mode processed_logprobs (`tink-rl serve` does)",
        )
    if status.no_full_logprobs is not None:
        return note(
            "logprobs",
            f"processed_logprobs, but none over the whole vocabulary ({status.no_full_logprobs}): a GRPO run "
            "with top_k, a penalty, a grammar, ... is refused",
        )
    return ok("logprobs", "processed_logprobs, and those of the whole vocabulary under top_k, ...")


def _transport(url: str) -> Finding:
    if is_local(url):
        return ok("network", "loopback only")
    if urlsplit(url).scheme == "https":
        return ok(
            "network", "TLS; use SyncConfig(transport='http'), the channel has no TLS of its own"
        )
    return warning(
        "network",
        f"{url}: token and weights travel without encryption",
        "a private network, or a TLS proxy and transport='http'",
    )


def _clock(client: SamplingClient) -> Finding:
    offset = client.clock_offset_s()
    if offset is None:
        return note("clock", "the server's answers carry no date")
    if abs(offset) > _MAX_CLOCK_S:
        text = f"the server's clock is {offset:+.0f} s off: its log will not line up with this one"
        return warning("clock", text, "set both clocks by NTP (timedatectl set-ntp true)")
    return ok("clock", "agrees with this machine's")


def _base(status: ServerStatus, base_model: str) -> Finding:
    if base_fingerprint(base_model) == status.base_fingerprint:
        return ok("base", f"{base_model!r} is what the server serves")
    return blocker(
        "base",
        f"{base_model!r} is not the base that is served ({status.base_model!r})",
        f"tink-rl serve {base_model}",
    )
