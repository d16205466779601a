"""setuptools' backend, plus cmake as a build requirement only where no cmake runs.

Listing cmake in pyproject.toml would make builds without isolation fail where the system's own cmake is the one to use.
"""

import subprocess

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F401,F403  (the hooks that stay as they are)


def _cmake_runs():
    """One that pip installed is a script that imports a module, which an isolated build does not see."""
    try:
        return subprocess.run(["cmake", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def _with_cmake(requirements):
    return requirements + ([] if _cmake_runs() else ["cmake>=3.18"])


def get_requires_for_build_wheel(config_settings=None):
    return _with_cmake(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_cmake(build_meta.get_requires_for_build_editable(config_settings))
