"""What a starting vLLM is busy with, read from its log. Pure."""

from __future__ import annotations

import re

_STAGES = (
    (r"non-default args", "reading the model's config"),
    (r"Resolved architecture", "starting the engine"),
    (r"Initializing a V1 LLM engine", "starting the workers"),
    (
        r"Starting to load model|Loading model from scratch|Loading weights took",
        "loading the model",
    ),
    (r"Time spent downloading weights", "loading the model"),
    (r"Loading [\w ]*checkpoint shards:\s+(\d+)%", "loading the model"),
    (r"for vLLM's torch\.compile|Dynamo bytecode transform", "compiling (torch.compile)"),
    (r"Compiling a graph for|Directly load ", "compiling (torch.compile)"),
    (r"torch\.compile took|profiling/warmup run took", "trying the largest batch"),
    (r"Available KV cache memory|KV cache size:", "sizing the KV cache"),
    (r"Capturing CUDA graphs[^\n\r]*?(\d+)%", "capturing CUDA graphs"),
    (r"Graph capturing finished|init engine \(", "starting the API server"),
    (r"Starting vLLM server", "preparing the receiver"),
    (r"Application startup complete", "server is up"),
)


def stage(log: str) -> str:
    """What the last line that tells a stage stands for; with a share done, where vLLM says one.

    Example: "capturing CUDA graphs: 43 %"
    """
    last, name, share = -1, "importing vLLM", ""
    for pattern, text in _STAGES:
        for match in re.finditer(pattern, log):
            if match.start() > last:
                last, name = match.start(), text
                share = f": {match[1]} %" if match.groups() else ""
    return name + share
