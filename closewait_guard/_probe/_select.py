"""The select module as the interpreter made it, whatever has been done to the one in use.

gevent puts a poll of its own there that runs through its event loop; eventlet takes poll away. We
never wait, so there is nothing that green threads would have to be switched for.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING

__all__ = ["select"]

if TYPE_CHECKING:
    import select
else:
    _spec = find_spec("select")
    select = module_from_spec(_spec)
    _spec.loader.exec_module(select)
