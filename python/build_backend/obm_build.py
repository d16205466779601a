"""setuptools' backend, plus cmake as a build requirement only where no cmake is installed.

Listing cmake in pyproject.toml would make builds without isolation fail where the system's own cmake is the one to use.
"""

import shutil

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F401,F403  (the hooks that stay as they are)


def _with_cmake(requirements):
    return requirements + ([] if shutil.which("cmake") else ["cmake>=3.18"])


def get_requires_for_build_wheel(config_settings=None):
    return _with_cmake(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_cmake(build_meta.get_requires_for_build_editable(config_settings))
