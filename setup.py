"""Adds the compiled libraries (ham_kernels/ops/native) to the build of the package. Never imports torch."""

import importlib
import shutil
import sys
import types
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent


def load_native():
    """ham_kernels/ops/native/build.py without the package itself, which needs torch: in a stand-in for it."""
    package = sys.modules.setdefault("_ham_build", types.ModuleType("_ham_build"))
    package.__path__ = [str(ROOT / "ham_kernels" / "ops" / "native")]
    return importlib.import_module("_ham_build.build")


class build_native(Command):
    """Compiles into the checkout (editable) or beside the copied package (wheel)."""

    description = "build the CUDA extension if there is an nvcc, and the CPU library if there is a C++ compiler"
    user_options = []

    def initialize_options(self):
        self.editable_mode = False
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        native = load_native()
        try:
            native.build(ROOT, self.out_dir)
        except (native.cuda.BuildError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None

    @property
    def out_dir(self):
        return ROOT / "ham_kernels" if self.editable_mode else Path(self.build_lib) / "ham_kernels"

    # What setuptools asks of a build step. Editable: the files are already where they are imported from.
    def get_outputs(self):
        return [] if self.editable_mode else [str(self.out_dir / name) for name in load_native().FILES]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir())]


class BuildWithNative(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]

    def run(self):
        # setuptools never clears build/lib: files deleted from the checkout since would end up in the wheel.
        for package in ("ham_kernels", "ham_reference"):
            shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, but on no Python version: py3-none-<platform>."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    distclass=PlatformDistribution,
    cmdclass={"build": BuildWithNative, "build_native": build_native, "bdist_wheel": PlatformWheel},
)
