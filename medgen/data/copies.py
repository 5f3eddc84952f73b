"""Scans made of identical bytes, under whatever names: they must never be in two splits."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256

from medgen.data.layout import Draft
from medgen.io.source import ReadOptions


def leaders(drafts: list[Draft], options: ReadOptions) -> dict[str, str]:
    """For each patient the first of all patients who are tied to them by identical files."""
    leader = {one.patient: one.patient for one in drafts}

    def top(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    for same in _copies(drafts, options):
        first, *others = sorted({top(one.patient) for one in same})
        for other in others:
            leader[other] = first
    return {patient: top(patient) for patient in leader}


def _copies(drafts: list[Draft], options: ReadOptions) -> Iterable[list[Draft]]:
    """Groups of scans made of identical bytes, found by size, then by their ends, then by all of it."""
    collected = [one for one in drafts if one.source.kind == "npz"]
    groups = [collected] if collected else []
    by_size: dict[tuple[int, ...], list[Draft]] = defaultdict(list)
    for one in drafts:
        if one.source.kind != "npz":
            by_size[tuple(file.stat().st_size for file in one.source.files)].append(one)
    groups += by_size.values()
    for look in (_glance, _digest):
        split = []
        for group in groups:
            apart: dict[bytes, list[Draft]] = defaultdict(list)
            for one in group if len(group) > 1 else ():
                apart[look(one, options)].append(one)
            split += [same for same in apart.values() if len(same) > 1]
        groups = split
    return groups


def _glance(one: Draft, options: ReadOptions) -> bytes:
    if one.source.kind == "npz":
        return _digest(one, options)
    ends = sha256()
    for file in one.source.files:
        with file.open("rb") as stream:
            ends.update(stream.read(65536))
            stream.seek(max(0, file.stat().st_size - 65536))
            ends.update(stream.read(65536))
    return ends.digest()


def _digest(one: Draft, options: ReadOptions) -> bytes:
    if one.source.kind == "npz":
        from medgen.io import read

        voxels = read(one.source, replace(options, colour=True)).voxels
        return sha256(repr(voxels.shape).encode() + voxels.tobytes()).digest()
    whole = sha256()
    for file in one.source.files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                whole.update(block)
    return whole.digest()


__all__ = ["leaders"]
