"""Files that are whole or not there: durable writes, lists of files with checksums, one owner per folder, room.

Idea: a run may be killed, the power may fail, a disk may fill up or flip a bit, and two runs may be started in one
folder. None of that may cost what was good before.

1. replacing, write_durably   a file or folder appears under its name only when it is whole, and on the disk
2. list_files, damage   what a folder held when it was written, with sizes and checksums, and what has changed since
3. FolderLock      one process at a time owns a folder; its death frees it
4. check_writable, check_room   what can be known before long work: may this folder be made, and is there room?

Renaming is atomic, but not enough: after a power failure a renamed file can have its new name and no content. So the
content is flushed to the disk before the rename (fsync of the file), and the rename after it (fsync of the folder).
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link without what it points to, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or a folder so that under its name there is only ever a whole one, the old or the new.

    Yields:
        the path to write to, of the same ending, which takes the place of `path` when the block has ended well.

    Raises:
        ValueError: if it cannot be written; see `cannot_write`. The old one stays.
    """
    unfinished, old = path.with_name(f".writing-{path.name}"), path.with_name(f".old-{path.name}")
    try:
        for left in (unfinished, old):  # by a run that was killed
            remove(left)
        yield unfinished

        # Content first, names second. A folder can only take a name that is free, and deleting one takes time, in which
        # a kill would leave a part of it: so the old one moves aside first.
        for written in (unfinished, *unfinished.rglob("*")):
            sync(written)
        if unfinished.is_dir() and path.is_dir():
            os.replace(path, old)
        os.replace(unfinished, path)
        sync(path.parent)
        remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        with suppress(OSError):  # on a full disk half a model would be in the way of everything else
            remove(unfinished)
        raise cannot_write(path, error) from error


def write_durably(path: Path, text: str) -> None:
    """Write a text file; see `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path, but: str) -> dict[str, dict]:
    """Every file below a folder, synced: name -> its size in bytes and its checksum; `but` is the list's own name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != but)
    for path in files:
        sync(path)
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for name, path in names.items()}


def damage(folder: Path, files) -> str | None:
    """What is wrong with a folder, in a few words, if it is not what `list_files` said; None if nothing is."""
    well_formed = isinstance(files, dict) and all(
        isinstance(f, dict) and {"bytes", "sha256"} <= f.keys() for f in files.values()
    )
    if not files or not well_formed:
        return "its list of files is torn"
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
        if checksum(path) != wanted["sha256"]:
            return f"{name} has changed since it was written"
    return None


class FolderLock:
    """The only run in a folder, from its making until `release` or the death of its process.

    The kernel keeps the lock (flock) and drops it with the process, so a killed run leaves nothing to clean up. The
    file .lock stays, and says who had it last.

    Raises:
        ValueError: if another process has it, saying which; or if it cannot be taken.
    """

    def __init__(self, folder: Path):
        try:
            self.file = (folder / ".lock").open("a+", errors="replace")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise ValueError(f"--out {folder} is in use by {owner}: wait for it, or name another folder") from None
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"--out {folder} cannot be locked: its file .lock must be yours to write ({reason})"
            ) from error
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self.file.flush()

    def release(self) -> None:
        """Let others have the folder."""
        self.file.close()


def check_writable(folder: Path, flag: str = "--out") -> None:
    """A folder can be made, or is there, and files can be written into it. Nothing is left behind.

    Args:
        flag: that named the folder.

    Raises:
        ValueError: one sentence, naming what stands in the way.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag} {os.fsencode(folder)!r} is not UTF-8 text, which the libraries need") from None

    # The nearest thing that exists: of a/b/c that may be a. A link that points nowhere exists only as a link.
    try:
        nearest = folder.absolute()
        while not os.path.lexists(nearest):
            longest = os.pathconf(nearest.anchor, "PC_NAME_MAX")
            if len(os.fsencode(nearest.name)) > longest:
                raise ValueError(f"{flag} {folder}: a name may have {longest} bytes at most")
            nearest = nearest.parent
        if not nearest.exists():
            raise ValueError(f"{flag} {folder}: {nearest} is a link that points nowhere")
        if not nearest.is_dir():
            raise ValueError(f"{flag} {folder}: {nearest} is a file, not a folder")
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(f"{flag} {folder} cannot be written: {error.strerror or error}") from error


def check_room(folder: Path, needed: float, what: str) -> None:
    """There is room for what will be written.

    Args:
        folder: that exists.
        needed: bytes.
        what: they are for.

    Raises:
        ValueError: if there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        gib = f"{needed / 2**30:.2f} GiB for {what}, and {free / 2**30:.2f} are free"
        raise ValueError(f"--out {folder} needs about {gib}: free some, or give a smaller --keep")


def cannot_write(folder: Path, error: Exception) -> ValueError:
    """What to raise where writing failed in the middle of a run: one sentence with the reason and the room left."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not folder.parent.is_dir():
        return ValueError(f"{folder} cannot be written ({reason}): {folder.parent} is not there")
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 2**30
    room = "no space is left on its disk" if free < 0.01 else f"{free:.2f} GiB are free on its disk"
    return ValueError(
        f"{folder} cannot be written ({reason}); {room}. What was there before is whole: go on with --resume"
    )


def read_json(path: Path, what: str) -> dict:
    """A JSON object that a run wrote.

    Raises:
        ValueError: if it is missing or damaged, with what it is needed for.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).strip() or 'it is empty'}): {what}") from error
