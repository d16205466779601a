"""Builds the CPython extension with CMake; metadata is in pyproject.toml, the version in core/include/onebitmerge.h."""

import os
import pathlib
import re
import subprocess
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
# Free-threaded CPython has no stable ABI yet, so it gets a version-specific extension.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


def version():
    header = (ROOT / "core/include/onebitmerge.h").read_text(encoding="utf-8")
    return ".".join(re.search(rf"OBM_VERSION_{part} (\d+)", header).group(1) for part in ("MAJOR", "MINOR", "PATCH"))


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        build = pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        suffix = target.name[len("_core"):]
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-DOBM_PYTHON=ON", "-DOBM_INSTALL=OFF",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={os.sys.executable}",
            f"-DOBM_PY_OUTDIR={target.parent}", f"-DOBM_PY_SUFFIX={suffix}",
            f"-DOBM_PY_LIMITED={'ON' if LIMITED else 'OFF'}",
        ] + os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        jobs = str(self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--target", "onebitmerge_python", "-j", jobs], check=True)


setup(
    version=version(),
    packages=["onebitmerge"],
    package_dir={"": "python"},
    package_data={"onebitmerge": ["py.typed", "*.pyi", "*.lua"]},
    ext_modules=[Extension("onebitmerge._core", sources=[], py_limited_api=LIMITED)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
