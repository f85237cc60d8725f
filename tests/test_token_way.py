"""The package's docstring tells a token's way by names that exist."""

import re
from pathlib import Path
from pkgutil import resolve_name

import moejet

ROOT = Path(__file__).parents[1]


def test_names_exist():
    names = re.findall(r"`([a-z_]+(?:\.\w+)*)`", moejet.__doc__)
    assert len(names) > 30
    for name in names:
        resolve_name(f"moejet.{name}")


def test_sources_exist():
    sources = re.findall(r"csrc/\w+\.h", moejet.__doc__)
    assert sources
    assert all((ROOT / source).is_file() for source in sources)
