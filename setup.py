"""
The README that PyPI shows; all else is in pyproject.toml.

PyPI knows no files of the repository, so relative links are made absolute from the environment variable REPOSITORY_URL:

    REPOSITORY_URL=https://github.com/me/mm-transformers python -m build

Without it, they are left out.
"""

import os
import sys
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "docs"))
from links import with_absolute_links  # noqa: E402


sys.path.pop(0)


url = os.environ.get("REPOSITORY_URL")
setup(
    long_description=with_absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), url),
    long_description_content_type="text/markdown",
    project_urls={"Repository": url} if url else {},
)
