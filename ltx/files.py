"""Writing so that a reader never meets half a file, and hashes of tensors."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import math
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ltx.errors import LtxError

log = logging.getLogger(__name__)
ABANDONED = 3600.0  # seconds after which nobody writes to a temporary file any more


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends without an error.

    Raises:
        LtxError: the folder cannot be written to, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):  # by a process that was killed
            with contextlib.suppress(OSError):  # gone by now, or somebody else's
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        part.touch(exist_ok=False)  # with the mode that the process' umask says
        yield part
        os.replace(part, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """LtxError where nothing can be written to `folder`, before long work is done for it; makes no folder itself."""
    folder = Path(folder).absolute()
    try:
        there = next(path for path in (folder, *folder.parents) if _exists(path))
        for missing in folder.relative_to(there).parts:
            _exists(there / missing)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _exists(path: Path) -> bool:
    """Whether there is anything of that name; OSError where there cannot be."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _cannot_write(path: Path, error: OSError) -> LtxError:
    reason = error.strerror or str(error).splitlines()[0]
    return LtxError(f"cannot write {path}: {reason}; choose another place with output_dir=DIR")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` at once or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON; not-a-number is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def with_null(value: Any) -> Any:
    """A result as JSON has it: None for what is infinite or not a number."""
    if isinstance(value, dict):
        return {key: with_null(part) for key, part in value.items()}
    if isinstance(value, list):
        return [with_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_result(path: Path, about: Mapping[str, object]) -> dict | None:
    """The JSON object at `path` where it says all of `about`; None where there is none, a damaged or another one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise TypeError(f"a {type(result).__name__}")
        return result if all(result[key] == value for key, value in about.items()) else None
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        log.info("%s is damaged, or of an earlier ltx", path)
        return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone."""
    from safetensors.torch import save

    data = save(
        {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)},
        metadata=dict(sorted(metadata.items())),
    )
    with replacing(path) as part:
        part.write_bytes(_canonical(data))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; OSError or SafetensorError where it cannot be read."""
    from safetensors import safe_open

    with path.open("rb"):  # safetensors says of any that it cannot open that it is not there
        pass
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dict


def _canonical(data: bytes) -> bytes:
    """The same safetensors file with its JSON header sorted: the library writes metadata in hash order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
