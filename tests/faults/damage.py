"""Damaged files, in every cache: what is damaged is found out and made again, or refused in a sentence; never believed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from rome_lab import load_edit, rome
from rome_lab.editing.settings import EditSettings
from rome_lab.facts.published_sets import digest_of, published_file
from rome_lab.models import packaged
from tests.faults.outcome import Outcome, Setting
from tests.faults.work import WORK, load, one_thread, results, said
from tests.tiny import known

SLOW = 6  # a store is damaged this many times less often than a single file, since the work is done again each time
PAGE = 512


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flip(data: bytes, chance: random.Random) -> bytes:
    place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def lose_a_page(data: bytes, chance: random.Random) -> bytes:
    """As after a power cut: part of the file is zeros."""
    begin = chance.randrange(0, len(data), PAGE)
    return data[:begin] + bytes(len(data[begin : begin + PAGE])) + data[begin + PAGE :]


def lengthen(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 100))


def replace(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1000))


HOW: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, flip, lose_a_page, lengthen, replace)


def damage(path: Path, chance: random.Random) -> bool:
    """Damage a file at random; returns whether that made any difference."""
    whole = path.read_bytes()
    path.write_bytes(damaged := chance.choice(HOW)(whole, chance))
    return damaged != whole


def damage_all(setting: Setting) -> Iterator[Outcome]:
    """Damage edits, data sets, converted models and, which takes longest, the caches of each sort of work."""
    lm = load(setting.model)
    yield damage_edit(setting, lm)
    yield damage_data_set(setting)
    yield damage_converted(setting, lm)
    for kind in setting.in_process:
        yield damage_store(setting, lm, kind)


def damage_store(setting: Setting, lm, kind: str) -> Outcome:
    """Half of the files damaged, or in each other's places: the results are the same as ever."""
    outcome = Outcome(f"damaged files in the caches of {kind}")
    if setting.no_time_for(outcome):
        return outcome
    whole, expected, _ = setting.undisturbed(kind)
    for _ in setting.rounds_of(outcome, max(1, setting.rounds // SLOW)):
        folder = setting.fresh(kind)
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        paths = list(results(folder))
        for path in setting.chance.sample(paths, max(1, len(paths) // 2)):
            if setting.chance.random() < 0.8:
                damage(path, setting.chance)
            else:
                shutil.copyfile(setting.chance.choice(sorted(path.parent.iterdir())), f"{path}.moved")
                os.replace(f"{path}.moved", path)
        try:
            with one_thread():
                found = WORK[kind](lm, setting.model, folder)
            outcome.expect(found == expected, f"{folder.name}: the results differ from those of whole files")
        except Exception as error:
            outcome.expect(False, f"{folder.name}: {said(error)}")
        outcome.tried += 1
        shutil.rmtree(folder)
    return outcome


def damage_edit(setting: Setting, lm) -> Outcome:
    """A damaged edit is refused."""
    outcome = Outcome("damaged edit files")
    C = torch.eye(lm.memory(1).weight.shape[1])
    settings = EditSettings(prefixes=("It is. ",), steps=2)
    edit = rome(lm, known(lm)[0], "another", 1, C=C, hparams=settings, progress=False)
    path = setting.fresh("edit") / "edit.safetensors"
    for _ in setting.rounds_of(outcome, setting.rounds):
        edit.save(path)
        if damage(path, setting.chance):
            outcome.tried += 1
            try:
                outcome.expect(load_edit(path).digest == edit.digest, "a damaged edit was loaded as another edit")
                outcome.expect(False, "a damaged edit was loaded")
            except ValueError as error:
                outcome.expect(str(error).startswith("load_edit: "), said(error))
    return outcome


class NoNetwork:
    """An opener that reaches nothing."""

    def open(self, *args: object, **kwargs: object) -> None:
        raise OSError("no network")


def damage_data_set(setting: Setting) -> Outcome:
    """A data set is thrown away when it is damaged, or its checksum; without a network that is said."""
    outcome = Outcome("damaged data sets in the cache")
    folder = setting.fresh("cache") / "datasets"
    folder.mkdir()
    path = folder / "known_1000.json"
    seal = path.with_suffix(".sha256")
    with mock.patch.dict(os.environ, ROME_LAB_CACHE=str(folder.parent)):
        for _ in setting.rounds_of(outcome, setting.rounds):
            path.write_text(
                '[{"subject": "Lima", "attribute": "Peru", "template": "{} is in", "prompt": "Lima is in"}]'
            )
            seal.write_text(digest_of(path))
            outcome.expect(published_file("known_1000", NoNetwork()) == path, "a whole file was not used")
            if damage(setting.chance.choice((path, seal)), setting.chance):
                outcome.tried += 1
                try:
                    published_file("known_1000", NoNetwork())
                    outcome.expect(False, "a damaged data set was used")
                except ConnectionError as error:
                    outcome.expect("could not be downloaded" in str(error), said(error))
    return outcome


def damage_converted(setting: Setting, lm) -> Outcome:
    """Damage to any file of a converted model is seen, after which it is converted again."""
    outcome = Outcome("damaged files of a converted model")
    folder = setting.fresh("converted") / "model"
    lm.save_pretrained(folder)
    (folder / packaged.HASHES).write_text(packaged.hashes_of(folder))
    outcome.expect(packaged.is_whole(folder), "a whole model was taken for a damaged one")
    paths = sorted(folder.iterdir())
    for _ in setting.rounds_of(outcome, setting.rounds // SLOW):
        path = setting.chance.choice(paths)
        whole = path.read_bytes()
        if damage(path, setting.chance):
            outcome.tried += 1
            outcome.expect(not packaged.is_whole(folder), f"damage to {path.name} was not seen")
        path.write_bytes(whole)
    return outcome
