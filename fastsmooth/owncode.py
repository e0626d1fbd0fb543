"""Code of the user's own, by name: FILE.py:NAME.

A file is read once, and what was read is run as a module that nothing else imports. Whatever is
wrong with it is one line: the file, the line in it, Python's words. Modules beside the file may be
imported by it; they belong to it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsmooth.names import hint
from fastsmooth.runfolder.files import read_file, replace, writing

LARGEST = 1 << 22  # bytes of a file of code
LISTED = 8  # names of a file that a message lists
LONGEST = 300  # characters of an error's words


class CodeError(ValueError):
    """Code of the user's that cannot be used; the message names the file and the line."""


def split(spec: str) -> tuple[Path, str]:
    """The file and the name in FILE.py:NAME."""
    file, _, name = spec.rpartition(":")
    return Path(file), name


def whole(path: Path | str) -> Path:
    """From the root, by the name it has: a link stays one."""
    return Path(os.path.abspath(path))


def load(spec: str) -> Any:
    """What FILE.py:NAME names. Raises CodeError."""
    path, name = split(spec)
    own = vars(module_of(path))
    if name in own:
        return own[name]
    public = [key for key, v in own.items() if key[0] != "_" and not isinstance(v, ModuleType)]
    there = hint(name, public) or f"it has {', '.join(public[:LISTED]) or 'none'}"
    raise CodeError(f"{path} has no {name}: {there}")


def module_of(path: Path) -> ModuleType:
    """The file as a module, run when it is first asked for. Raises CodeError."""
    try:
        content = read_file(path, LARGEST)
    except OSError as error:
        raise CodeError(f"{path}: {error.strerror}: give a file of Python code") from None
    key = hashlib.sha256(str(whole(path)).encode() + b"\0" + content).hexdigest()[:16]
    private = f"_own_{path.stem}_{key}"
    if private in sys.modules:
        return sys.modules[private]
    module = ModuleType(private)
    module.__file__ = str(whole(path))
    beside = str(whole(path).parent)
    if beside not in sys.path:
        sys.path.append(beside)  # the last place: it hides no other module
    sys.modules[private] = module  # where dataclasses and pickle look for it
    try:
        # not imported by its name, so that what was read, and is summed, is what runs
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    except KeyboardInterrupt:
        del sys.modules[private]
        raise
    except BaseException as error:
        del sys.modules[private]
        raise CodeError(fault(error, path)) from None
    return module


def fault(error: BaseException, path: Path) -> str:
    """In one line: the file and line of the user's in which an error was raised, and its words."""
    words = " ".join(str(error).split())[:LONGEST]
    if isinstance(error, SyntaxError) and error.filename:
        line = f" line {error.lineno}" if error.lineno else ""
        return f"{error.filename}{line}: {type(error).__name__}: {error.msg}"
    kind = type(error).__name__ + (f": {words}" if words else "")
    if isinstance(error, SystemExit):
        kind = f"it ends the process ({kind}): keep that under if __name__ == '__main__'"
    home = whole(path).parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if whole(frame.filename).parent == home]
    return f"{own[-1].filename} line {own[-1].lineno}: {kind}" if own else f"{path}: {kind}"


def takes(function: Any, name: str) -> bool:
    """Whether a function or class has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of code that is not Python's
        return False


def files_of(path: Path) -> dict[str, bytes]:
    """A file that has run and the modules beside it that were imported, by their names. Raises
    CodeError where one cannot be read any more."""
    home = whole(path).parent
    found = {whole(path)}
    for module in list(sys.modules.values()):
        file = vars(module).get("__file__")
        if isinstance(file, str) and file.endswith(".py") and whole(file).parent == home:
            found.add(whole(file))
    try:
        return {file.name: read_file(file, LARGEST) for file in sorted(found)}
    except OSError as error:
        raise CodeError(f"{error.filename}: {error.strerror}: give a file of Python code") from None


def keep(folder: Path, files: dict[str, bytes]) -> None:
    """Put copies of the files into a folder. One that is there with other content stays, with its
    sum in its name. Raises CannotWrite."""
    with writing(folder):
        if files:
            folder.mkdir(exist_ok=True)
        for name, content in files.items():
            copy = folder / name
            before = read_file(copy, LARGEST) if copy.exists() else content
            if before != content:
                replace(copy.with_stem(f"{copy.stem}-{digest(before)}"), before)
            if before != content or not copy.exists():
                replace(copy, content)


def digest(content: bytes) -> str:
    """The first 16 digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]
