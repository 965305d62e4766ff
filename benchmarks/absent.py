"""Stand-ins for libraries that a step of training never calls, so that it can be timed on a machine that lacks them."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# selfsight imports these for reading, scoring and reports.
UNUSED = ("faiss", "webdataset", "sklearn", "fsspec", "jinja2", "rich")


class Empty(ModuleType):
    """A module that has every name, each a class of no use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder(MetaPathFinder, Loader):
    """Finds empty modules under these names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Of a name, or of what lies below it."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Empty."""
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def stand_in(names: Sequence[str] = UNUSED) -> list[str]:
    """Give the import system a stand-in for each that is not installed; the answer is which."""
    gone = [name for name in names if find_spec(name) is None]
    if gone:
        sys.meta_path.append(Finder(gone))
    return gone
