"""Why a vLLM server ended: the cause from its exit code, its log and what the kernel counted. A leaf."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

from tink_rl import errors
from tink_rl.errors import LaunchFailed, TinkError

_GOLDEN_MARK = "golden_does_not_fit: "
_SHM = "/dev/shm"
_SHM_WORDS = r"Insufficient space in /dev/shm|/dev/shm.*No space left"
_MEMORY_PATTERN = re.compile(
    r"out of memory|OutOfMemoryError|No available memory for the cache blocks|Cannot allocate memory|"
    r"larger than the available KV cache memory|less than desired GPU memory utilization|"
    r"not enough memory",
    re.IGNORECASE,
)
_PREFIX = re.compile(
    r"^\([^)]*\)\s?|^(ERROR|CRITICAL) [\d\- :.]+\[[^\]]*\]\s?|^ERROR\s+\[[^\]]*\]\s?"
)
_ALL_IS_WELL = re.compile(r"^(WARNING|INFO|DEBUG)\b")
_EXCEPTION = re.compile(
    r"^(?P<name>[A-Za-z_][\w.]*(Error|Exception|Failed|Exit|Interrupt))(:\s|:?$)"
)
_COMPLAINT = re.compile(r"^\S*: error: |^ERROR: ")
_CONSEQUENCE = re.compile(
    r"[Ss]ee (root cause|stack trace)|Engine core initialization failed|EngineDeadError|"
    r"Engine core process \S+ died|died with exit code|EngineGenerateError|CancelledError"
)
_CHAINED = re.compile(
    r"During handling of the above exception|The above exception was the direct cause"
)
_DIED = (
    re.compile(r"Worker proc (?P<who>\S+) died unexpectedly \(exit code: -(?P<number>\d+)\)"),
    re.compile(r"Process (?P<who>\S+) \(PID: \d+\) died with exit code -(?P<number>\d+)"),
    re.compile(r"Failed core proc\(s\):.*?'(?P<who>[^']+)': -(?P<number>\d+)"),
)
_FATAL = re.compile(
    r"Fatal Python error: (Illegal instruction|Segmentation fault|Aborted|Bus error)"
)
_FATAL_SIGNALS = {
    "Illegal instruction": signal.SIGILL,
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
}
_REMEDIES = (
    (_SHM_WORDS, f"give it more (docker: --shm-size=1g; else `mount -o remount,size=1g {_SHM}`)"),
    (r"No space left on device|Disk quota",
     "free space, or set HF_HOME and VLLM_CACHE_ROOT to a larger disk"),
    (r"Too many open files", "raise the limit, `ulimit -n 65536`, and start it again"),
    (r"not supported for now|does not recognize this architecture",
     "serve another model, or install the vLLM and transformers that know it"),
    (r"GatedRepo|401 Client Error|403 Client Error",
     "ask for access on the model's page, then `hf auth login`"),
    (r"SafetensorError|not fully covered", "a file of the model is damaged: download or copy it again"),
    (r"unrecognized arguments", "`vllm serve --help=all` lists vLLM's flags, `tink-rl serve --help` ours"),
    (r"greater than the derived max_model_len", "lower --max-model-len"),
    (r"NVIDIA driver on your system is too old", "`tink-rl doctor` says which driver is needed"),
)  # fmt: skip
"""What mends a cause, by vLLM's, torch's and the system's words for it; the first that matches."""
_NOT_ITS_FAULT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def explain(
    what: str,
    log: str,
    log_path: str,
    *,
    exit_code: int | None = None,
    oom_kills: int | None = None,
) -> TinkError:
    """The one line that a user needs of a server that ended.

    Args:
        what: How the line begins.
        log: Of this start.
        log_path: Where it lies.
        exit_code: Of the server's process, if it ended: negative or above 128 for a signal.
        oom_kills: By how much `count_oom_kills` rose since the start, if that is known.
    """
    _, golden, reason = log.partition(_GOLDEN_MARK)
    if golden:
        return errors.ModeUnavailable(
            f"{reason.splitlines()[0]}; log: {log_path}", code="golden_does_not_fit"
        )
    memory = [line for line in log.splitlines() if _MEMORY_PATTERN.search(line)]
    if memory:
        hint = re.sub(r"^.*?\]\s", "", memory[-1]).strip()[:200]
        return _out_of_memory(what, hint, log_path)
    if "address already in use" in log.lower():
        return errors.LaunchFailed(
            f"{what}: its port is in use; give another --port; log: {log_path}", code="port_taken"
        )
    killed = _killed(exit_code, log)
    if killed is not None:
        who, number = killed
        name = _name(number)
        if number == signal.SIGKILL and oom_kills:
            hint = (
                f"the kernel ended {who} with {name}: its count of such kills rose by {oom_kills}"
            )
            return _out_of_memory(what, hint, log_path)
        return LaunchFailed(
            f"{what}: {who} was ended by {name}: {_remedy(number)}; log: {log_path}"
        )
    cause = cause_in(log)
    remedy = next((f"; {says}" for pattern, says in _REMEDIES if re.search(pattern, cause)), "")
    return LaunchFailed(f"{what}: {cause or 'no error line in its log'}{remedy}; log: {log_path}")


def _out_of_memory(what: str, hint: str, log_path: str) -> errors.LaunchFailed:
    return errors.LaunchFailed(
        f"{what}: out of memory ({hint}); lower --max-model-len or --gpu-memory-utilization (on a "
        f"CPU: VLLM_CPU_KVCACHE_SPACE), or take a smaller model; log: {log_path}",
        code="out_of_memory",
    )


# -- signals ----------------------------------------------------------------------------------------


def _killed(exit_code: int | None, log: str) -> tuple[str, int] | None:
    """Which process a signal ended first, and which signal; None: none did."""
    if exit_code is not None and exit_code < 0:
        return "its watchdog", -exit_code
    if exit_code is not None and exit_code > 128:
        return "the API server", exit_code - 128
    found = [match for pattern in _DIED for match in pattern.finditer(log)]
    for match in sorted(found, key=lambda match: match.start()):
        if (
            int(match["number"]) not in _NOT_ITS_FAULT
        ):  # asked to stop, because another one had died
            return f"process {match['who']}", int(match["number"])
    fatal = _FATAL.search(log)
    return ("a process", _FATAL_SIGNALS[fatal[1]]) if fatal else None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _remedy(number: int) -> str:
    if number == signal.SIGILL:
        return (
            "an instruction that this CPU lacks, or the kernel keeps from it. With AMX: --dtype float32; "
            "else ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2; `tink-rl doctor` names the CPU's"
        )
    if number == signal.SIGKILL:
        return (
            "by a person or a supervisor, or by the kernel for want of memory (`dmesg` says so); then "
            "lower --max-model-len or VLLM_CPU_KVCACHE_SPACE"
        )
    if number == signal.SIGBUS:
        return f"shared memory that is full does this; {_shm_text()} (docker: --shm-size)"
    if number in _NOT_ITS_FAULT:
        return "another process asked it to stop"
    return "a fault in native code; the log's last lines say where"


def _shm_text() -> str:
    try:
        usage = shutil.disk_usage(_SHM)
    except OSError:
        return f"there is no {_SHM}"
    return f"{_SHM} has {usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free"


def count_oom_kills() -> int | None:
    """Processes that the kernel has ended for want of memory since the machine started; None: unknown."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return None
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


# -- exceptions ---------------------------------------------------------------------------------------


def cause_in(log: str) -> str:
    """The exception that came first, in the words of its last link; "" if the log has none.

    What follows in other processes (`See root cause above`) follows from it. A line of a traceback
    (`raise RuntimeError(`) or a warning that mentions an error is not a cause.
    """
    lines = [_bare(line) for line in log.splitlines()]
    first, chained = "", False
    for i, line in enumerate(lines):
        if _CHAINED.search(line):
            chained = True
            continue
        if not (_EXCEPTION.match(line) or _COMPLAINT.match(line)):
            continue
        if _CONSEQUENCE.search(line):
            continue
        if first and not chained:
            break
        first, chained = _whole(line, lines[i + 1 : i + 4]), False
        if (
            re.fullmatch(r"\w+:?", first) and i
        ):  # an exception without a word: the line that raised it
            first = f"{first} ({lines[i - 1].strip()})"
    return first[:300]


def _bare(line: str) -> str:
    """A line without what vLLM's log puts before it; "" for one that reports no error."""
    text, before = line.rstrip(), ""
    while text != before:
        before, text = text, _PREFIX.sub("", text, count=1)
    return "" if _ALL_IS_WELL.match(text) else text


def _whole(line: str, following: list[str]) -> str:
    """An exception's line with its message, where that begins on the next line."""
    if line.endswith(":") or "validation error" in line:
        line += " " + " ".join(text.strip() for text in following if text.strip())
    return " ".join(line.split())
