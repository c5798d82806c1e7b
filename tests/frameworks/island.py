"""Imports a few real modules of a framework; everything else of it is a stand-in.

A framework's own imports want its compiled parts and a dozen packages. What these tests are about
is the few files that call DeepEP: they are loaded as they are, unchanged, from where `fetch.py` put
them, and any other module of the framework becomes an object that can be named, subclassed, called
and used as a decorator, and is false.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class _StandInMeta(type):
    """Makes the class itself answer to everything."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if decorates and args[0] is not StandIn else StandIn

    def __bool__(cls) -> bool:
        return False

    def __getitem__(cls, _: Any) -> Any:
        return StandIn

    def __iter__(cls) -> Any:
        return iter(())


class StandIn(metaclass=_StandInMeta):
    """Stands for any name of a module that is not loaded."""


class _StandInModule(ModuleType):
    def __init__(self, name: str, submodules: Sequence[str]) -> None:
        super().__init__(name)
        self._submodules = submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        whole = f"{self.__name__}.{name}"
        return importlib.import_module(whole) if whole in self._submodules else StandIn


class Island(MetaPathFinder, Loader):
    """A finder for one framework.

    Args:
        root: Folder that holds the top package.
        packages: Its name, and those of other packages that are not installed.
        real: Modules that are loaded from their files.
        given: Attributes of stand-in modules that are not stand-ins themselves.
    """

    def __init__(
        self,
        root: Path,
        *packages: str,
        real: Sequence[str],
        given: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._root, self._packages = root, packages
        self._real, self._given = set(real), given or {}

    def __enter__(self) -> Island:
        """Imports of the framework go through this finder from here on."""
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it; what was imported stays."""
        sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Every module of the framework is found."""
        if name.partition(".")[0] not in self._packages:
            return None
        file = self._root.joinpath(*name.split("."))
        if name in self._real:
            where = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            return importlib.util.spec_from_file_location(name, where)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A stand-in."""
        module = _StandInModule(spec.name, list(self._given))
        for name, value in self._given.get(spec.name, {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""
