"""Code that is not part of armillary: packages and files that hold methods, readers or tasks of one's own.

Records of runs name classes by import path. A record may come from somebody else, so only classes of armillary and of
what `trust` was told are imported.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

__all__ = ["Packages", "import_path", "load_class", "load_module", "load_object", "trust"]

_trusted = {"armillary"}

Packages = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        metavar="NAME|PATH",
    ),
    tyro.conf.UseAppendAction,
]
"""Option `--package` of the commands that read a run back."""


def trust(*names: str) -> None:
    """Import packages, and let records of runs name their classes from now on.

    Args:
        names: As for `load_module`.

    Raises:
        ValueError: One cannot be imported.
    """
    for name in names:
        _trusted.add(import_path(load_module(name).__name__).partition(".")[0])


def load_module(name: str) -> ModuleType:
    """Import a module by its name, also out of the working folder, or by the path of its file or of its package's folder.

    Raises:
        ValueError: It cannot be imported, or another module has its name.
    """
    if name == import_path("__main__"):
        return sys.modules["__main__"]
    path = Path(name).resolve() if name.endswith(".py") or "/" in name else None
    if path is not None and not path.exists():
        raise ValueError(f"{name}: there is no such file or folder")
    folder = str(Path.cwd() if path is None else path.parent)
    if name not in sys.modules and folder not in sys.path:
        sys.path.append(folder)  # at the end, where it shadows nothing
    try:
        module = importlib.import_module(name if path is None else path.stem)
    except Exception as error:  # whatever the module does when it is imported
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = (
            str(error)
            if isinstance(error, ImportError | SyntaxError)
            else f"{error!r} in {where.filename}:{where.lineno}"
        )
        raise ValueError(
            f"{name}: cannot be imported ({said}); install it, add its folder to PYTHONPATH, or give the path of its folder "
            "or .py file in place of its name"
        ) from error
    places = [Path(p) for p in (module.__file__, *getattr(module, "__path__", ())) if p]
    if path is not None and path not in [p.resolve() for p in places]:
        raise ValueError(f"{name}: another module has the name {path.stem!r}, {places[0]}; rename the file")
    return module


def load_object(name: str) -> Any:
    """What `module:name` means; the module as for `load_module`.

    Raises:
        ValueError: There is no such module, or nothing of that name in it.
    """
    module, _, inside = name.rpartition(":")
    found: Any = load_module(module)
    for part in inside.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name}: there is no {inside} in {module}")
        found = getattr(found, part)
    return found


def load_class(name: str) -> Any:
    """`load_object` for a record, which may name classes of trusted packages only.

    Raises:
        ValueError: The package is not trusted, or as for `load_object`.
    """
    package = name.partition(":")[0].partition(".")[0]
    if package not in _trusted and package == "__main__":
        raise ValueError(f"class {name} was defined in a notebook or at a prompt; move it to a file and train again")
    if package not in _trusted:
        raise ValueError(
            f"class {name} is not part of armillary; if you trust its code, give --package {package}, or --package and the "
            "path of the package or of the recipe's file (in Python: armillary.engine.user_code.trust)"
        )
    return load_object(name)


def import_path(module: str) -> str:
    """The name by which another process can import a module, which differs for the script that was started."""
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):
        return spec.name
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else module
