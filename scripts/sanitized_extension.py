"""Puts another build of the native extension in the place of vllm_magicpig._C.

scripts/sanitize.py names the build in MAGICPIG_EXTENSION; tests/conftest.py and
scripts/fuzz_bindings.py call this before anything imports the extension. Python processes that a
test starts itself load the normal build.
"""

import importlib.util
import os
import sys

import vllm_magicpig

VARIABLE = "MAGICPIG_EXTENSION"


def load() -> None:
    """Does nothing where the variable is not set."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    name = "vllm_magicpig._C"
    if getattr(sys.modules.get(name), "__file__", None) == path:
        return
    if name in sys.modules:
        raise ImportError(f"{name} is loaded already; import {__name__} before it.")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = vllm_magicpig._C = module
