"""A headless Chromium, for what a person would see of a page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str:
    """Its program; fails (a skip would hide a page that nobody looked at) if there is none."""
    found = [path for name in (os.environ.get("TINK_BROWSER"), *_NAMES) if (path := _which(name))]
    if not found:
        raise AssertionError(
            "no Chromium was found; `make browser` (apt-get install chromium) brings one, or set "
            "TINK_BROWSER to a program that takes Chromium's flags"
        )
    return found[0]


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _run(page: Path, profile: Path, *flags: str, width: int, height: int) -> str:
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    # Nothing but the file itself can be loaded: a page that needs the network shows it.
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files"]
    command += [f"--window-size={width},{height}", *flags, page.absolute().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def screenshot(page: Path, image: Path, *, width: int = 1240, height: int = 2400) -> Path:
    """What the page looks like, as PNG."""
    profile = image.parent / "profile"
    _run(page, profile, f"--screenshot={image}", width=width, height=height)
    return image


def measure(page: Path, script: str, folder: Path, *, width: int = 1240) -> str:
    """What `script` (a JavaScript expression) says of the page once it is laid out."""
    copy = folder / "measured.html"
    probe = f"<script>onload=()=>{{document.title='measured:'+String({script})}}</script></body>"
    copy.write_text(page.read_text().replace("</body>", probe))
    dom = _run(copy, folder / "profile", "--dump-dom", width=width, height=1000)
    found = re.search(r"<title>measured:(.*?)</title>", dom, re.DOTALL)
    assert found, dom[:2000]
    return found.group(1)
