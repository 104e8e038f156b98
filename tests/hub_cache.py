"""A hub cache made by hand, as `hf download` leaves it: blobs, snapshots of links, and refs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_snapshot(cache: Path, repo: str, source: Path, *refs: str) -> Path:
    """Put the files of `source` into `cache` as a commit of `repo` that `refs` mean; the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    files = sorted(p for p in source.rglob("*") if p.is_file())
    names = [file.relative_to(source).as_posix() for file in files]
    content = b"".join(n.encode() + f.read_bytes() for n, f in zip(names, files, strict=True))
    commit = hashlib.sha1(content).hexdigest()
    for name, file in zip(names, files, strict=True):
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = home / "snapshots" / commit / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return home / "snapshots" / commit
