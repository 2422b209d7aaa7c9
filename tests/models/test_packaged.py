"""Models that come in packages: joined, checked and unpacked whole, or refused in a sentence that says what to install."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rome_lab import load_model
from rome_lab.models import packaged
from rome_lab.models.packaged import EMBEDDED_NAME, PACKAGED, Part, installed_file, packaged_folder, sha256_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def embedded() -> Path:
    """Folder of the embedded model in the user's own cache."""
    return packaged_folder(EMBEDDED_NAME)


@pytest.fixture
def pieces(monkeypatch, tmp_path) -> list[Path]:
    """The embedded model's file in three packages of its own, which are installed, and what unpacks to an empty cache."""
    whole = installed_file(EMBEDDED_NAME, PACKAGED[EMBEDDED_NAME].parts[0]).read_bytes()
    size, parts, paths = len(whole) // 3 + 1, [], []
    for number in range(3):
        paths.append(install(tmp_path / "site", f"piece{number}", f"x.part{number}", whole[number * size :][:size]))
        parts.append(Part(f"piece{number}", f"x.part{number}", sha256_of(paths[-1])))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "cache"))
    in_pieces = replace(PACKAGED[EMBEDDED_NAME], parts=tuple(parts), advice="Install the pieces.")
    monkeypatch.setitem(packaged.PACKAGED, "in pieces", in_pieces)
    return paths


def install(site: Path, package: str, file: str, content: bytes) -> Path:
    """The file of a package that is installed in the folder `site`."""
    info = site / f"{package}-0.1.2.dist-info"
    for folder in (info, site / package):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"{package}/{file},,\n")
    (site / package / file).write_bytes(content)
    return site / package / file


@pytest.mark.slow
def test_a_model_in_pieces_unpacks_to_the_same_weights_and_leaves_nothing_else(embedded, pieces) -> None:
    folder = packaged_folder("in pieces")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert sha256_of(folder / name) == sha256_of(embedded / name)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    pieces[1].unlink()  # what is unpacked does without the packages
    assert load_model("in pieces", device="cpu").n_layers == 30


def test_a_damaged_piece_is_named_with_its_package_and_nothing_is_unpacked(pieces, tmp_path) -> None:
    with pieces[1].open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    again = r"x\.part1 of the package piece1 is damaged.*SHA-256.*--force-reinstall --no-deps piece1==0\.1\.2"
    with pytest.raises(ValueError, match=again):
        load_model("in pieces")
    assert not (tmp_path / "cache").exists()


def test_a_missing_piece_and_a_missing_package_are_told_apart(pieces, tmp_path) -> None:
    pieces[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"piece2 has no file x\.part2; .*--force-reinstall --no-deps piece2=="):
        load_model("in pieces")
    for path in (tmp_path / "site" / "piece0-0.1.2.dist-info").iterdir():
        path.unlink()
    (tmp_path / "site" / "piece0-0.1.2.dist-info").rmdir()
    with pytest.raises(
        FileNotFoundError, match="package piece0 with weights of in pieces is missing; Install the pieces"
    ):
        load_model("in pieces")
    assert not (tmp_path / "cache").exists()


def test_what_comes_under_terms_says_so_where_it_is_missing(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.path", [])  # nothing is installed
    with pytest.raises(
        FileNotFoundError, match=r"make gemma.*pip install gemma3.*accept.*https://ai\.google\.dev/gemma/terms"
    ):
        load_model("gemma3-270m")


@pytest.mark.parametrize(("name", "file"), [(EMBEDDED_NAME, "model"), ("gemma3-270m", "gemma")])
def test_the_requirements_install_what_the_table_names(name, file) -> None:
    text = (ROOT / f"requirements-{file}.txt").read_text(encoding="utf-8")
    required = re.findall(r"^(\S+==\S+)", text, re.MULTILINE)
    assert {f"{part.package}=={PACKAGED[name].version}" for part in PACKAGED[name].parts} <= set(required)
    if file == "gemma":
        assert len(re.findall(r"^\S+==\S+ --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)) == len(required) == 5
