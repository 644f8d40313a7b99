"""How the extension is built: for users warnings are no errors, and all their CPUs compile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from check_warnings import ROOT

FLAGS = """
import setuptools
setuptools.setup = lambda ext_modules: print(*ext_modules[0].extra_compile_args)
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


def run_setup(**variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAGICPIG_")}
    return subprocess.run(
        [sys.executable, "-c", FLAGS],
        cwd=ROOT,
        env=kept | variables,
        capture_output=True,
        text=True,
    )


def test_warnings_are_errors_where_ci_asks_for_it() -> None:
    assert "-Werror" not in run_setup().stdout.split()
    assert "-Werror" in run_setup(MAGICPIG_WERROR="1").stdout.split()


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_a_wrong_number_of_jobs_is_named(jobs: str) -> None:
    result = run_setup(MAGICPIG_BUILD_JOBS=jobs)
    assert result.returncode == 1
    assert result.stderr.startswith(f"MAGICPIG_BUILD_JOBS is {jobs!r}, but must be a number of")
