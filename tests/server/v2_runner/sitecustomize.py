"""Makes a CPU build of vLLM run the model runner of GPUs (V2), with async scheduling; for one test's server.

The CPU build has that runner and lacks only a Triton for CPUs: Triton's interpreter stands in. Found by
Python at start, in every process of a server that has this folder on its PYTHONPATH.
"""

import importlib.abc
import importlib.metadata
import importlib.util
import sys
from types import SimpleNamespace

_version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.31.0+cpu" if name == "vllm" else _version(name)


def _add_backend(module):
    driver = SimpleNamespace(is_active=lambda: True)
    module.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def _schedule_ahead(module):
    platform = module.CpuPlatform
    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = classmethod(check_and_update_config)


class _After(importlib.abc.MetaPathFinder):
    """Calls `change(module)` when a module was imported."""

    def __init__(self, changes):
        self._changes = changes

    def find_spec(self, name, path, target=None):
        change = self._changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(
    0, _After({"triton.backends": _add_backend, "vllm.platforms.cpu": _schedule_ahead})
)
