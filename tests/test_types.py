"""The package passes mypy and ruff, as pyproject.toml sets them up."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent


def check(tool, *arguments):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install -e '.[test]'")
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_types(request):
    cache = request.config.cache.mkdir("mypy")
    check("mypy", "--cache-dir", str(cache))


def test_a_wrong_type_is_found(tmp_path):
    """So that the above does not pass because nothing is looked at."""
    (tmp_path / "wrong.py").write_text("x: int = 'text'\n")
    with pytest.raises(AssertionError, match="Incompatible types in assignment"):
        check("mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "wrong.py"))


def test_lint():
    check("ruff", "check", "--no-cache", ".")


def test_layout():
    check("ruff", "format", "--no-cache", "--check", ".")
