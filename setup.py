"""Builds the native expert library with the package; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))

from duck.errors import ConfigError
from duck.kernels import build


class BuildNative(build_ext):
    """One shared object for ctypes: no Python extension, so neither its name nor its flags."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path("duck", "kernels", build.file_name()))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_library(target)
        except ConfigError as problem:  # not fatal: a host needs no kernel, and first use retries
            raise CompileError(str(problem)) from problem


setup(
    ext_modules=[
        Extension(
            "duck.kernels._native",
            sources=sorted(str(path) for path in Path("duck/kernels/native").glob("*.cpp")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
