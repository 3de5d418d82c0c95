"""Folders that outlive a killed process: filled beside their place, put there whole, and sealed where that matters.

A sealed folder has a manifest of the sizes and digests of its files, by which a broken one is told from a whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masa_lib.crash_safe_files import digest, read_json, reading, share, sync

MANIFEST = "manifest.json"


def replace_folder(target: Path, write: Callable[[Path], object], sealed: bool = False) -> None:
    """Let `write` fill a folder beside `target`, and put it in its place once it is on the disk.

    Args:
        target: of the folder; its parent has to be there.
        write: fills the folder that it is given.
        sealed: with a manifest (`seal`), and what `target` held is dropped; else what is there and has another name
            stays, and a manifest is put in place last.
    """
    temporary = target.with_name(target.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        if sealed:
            seal(temporary)
            shutil.rmtree(target, ignore_errors=True)
        else:
            _sync_tree(temporary)
        _move(temporary, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _move(folder: Path, target: Path) -> None:
    """Rename a folder, or its files one by one where the target holds others."""
    if not target.is_dir() or not any(target.iterdir()):
        folder.rename(target)  # an empty folder is replaced
        return
    (target / MANIFEST).unlink(missing_ok=True)  # until all is in place, nothing says that it is whole
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)
    folder.rmdir()
    sync(target)


def seal(folder: Path) -> None:
    """Add a manifest (file name to bytes and SHA-256), share it, and wait until everything is on the disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {file.relative_to(folder).as_posix(): [file.stat().st_size, digest(file)] for file in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")
    share(folder)
    _sync_tree(folder)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def fault(folder: Path) -> str:
    """What is wrong with a sealed folder; empty when it is whole.

    Raises:
        RunError: the system does not let this user read it, which says nothing of whether it is whole.
    """
    try:
        with reading(folder):
            manifest = read_json(folder / MANIFEST)
            if not _is_manifest(manifest):
                return f"its {MANIFEST} is no table of files, sizes and digests"
            return next(filter(None, (_file_fault(folder, name, *entry) for name, entry in manifest.items())), "")
    except (FileNotFoundError, ValueError) as error:
        return f"it cannot be read: {error}"


def _is_manifest(found: Any) -> bool:
    """Whether this is what `seal` writes; names that lead out of the folder are not."""
    return isinstance(found, dict) and bool(found) and all(
        isinstance(entry, list) and [type(value) for value in entry] == [int, str] and name.isprintable()
        and not Path(name).is_absolute() and ".." not in Path(name).parts for name, entry in found.items())


def _file_fault(folder: Path, name: str, size: int, expected: str) -> str:
    if not (folder / name).is_file():
        return f"{name} is missing"
    if (held := (folder / name).stat().st_size) != size:
        return f"{name} has {held} bytes instead of {size}"
    return f"the content of {name} has changed" if digest(folder / name) != expected else ""
