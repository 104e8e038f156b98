"""The site builds without a warning, and its pages are the ones that there are."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tink_rl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    line = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_has_every_page(site):
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (site / name).is_file(), page.name


def test_api_page_holds_signatures_and_docstrings(site):
    text = (site / "api/index.html").read_text()
    for name in ("WeightSync", "VLLMServer", "SyncConfig", "PublishFailed", "write_report"):
        assert name in text
    assert "Publishes one policy to one or more servers" in text


def test_site_loads_nothing_from_elsewhere(site):
    text = (site / "index.html").read_text()
    loaded = re.findall(r"<(?:script|img|link rel=.?stylesheet)[^>]*(?:src|href)=[^>]*", text)
    assert loaded and not [tag for tag in loaded if "//" in tag]


def test_every_name_of_the_api_page_exists():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, attribute) or importlib.import_module(name), name


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs/api.md").read_text()
    for name in set(tink_rl.__all__) - {"__version__", "TinkError"}:
        assert re.search(rf"^::: [\w.]+\.{name}$", page, re.MULTILINE), name


def test_navigation_names_pages_that_exist():
    class Loader(yaml.SafeLoader):
        """mkdocs.yml may hold tags for Python names."""

    text = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r": (\w+\.md)$", text, re.MULTILINE)
    assert yaml.load(text, Loader)["nav"] and len(pages) == len(set(pages)) >= 10
    for page in pages:
        assert (ROOT / "docs" / page).is_file(), page
