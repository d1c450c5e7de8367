"""Build the extensions where they can be; all else stands in pyproject.toml.

It stands here because it depends on where the package is built, which a table cannot say. By
CLOSEWAIT_GUARD_SPEEDUPS, a setting of the package: 0 leaves them out, and gives one wheel for every
platform; 1 fails where one cannot be built; unset, it is left out there.
"""

import os
import shutil
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

VALUE = os.environ.get("CLOSEWAIT_GUARD_SPEEDUPS", "where it can be").lower()
UNWANTED = VALUE in {"0", "false", "no", "off", ""}
REQUIRED = VALUE in {"1", "true", "yes", "on"}
# It would turn the lock of a free-threaded interpreter on again, for all of the program.
FITS = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")

NAMES = ["_capture/_speedups", "_cpython/_calls"]
if sys.platform == "linux":
    NAMES.append("_signal/_deadline")
extensions = [
    Extension(
        f"closewait_guard.{name.replace('/', '.')}",
        [f"closewait_guard/{name}.c"],
        optional=not REQUIRED,
    )
    for name in NAMES
]


class FreshBuild(build_py):
    """Without what an earlier build has left: a module that is gone would be in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


if REQUIRED and not FITS:
    sys.exit("CLOSEWAIT_GUARD_SPEEDUPS is on: the extensions are not for this interpreter")
setup(
    ext_modules=extensions if FITS and not UNWANTED else [],
    cmdclass={"build_py": FreshBuild},
)
