"""Folders that `save_to_disk` of the library `datasets` wrote: which files hold the rows. Knows no file system.

A Dataset is a folder with state.json, dataset_info.json and the Arrow files that state.json names; a DatasetDict is a
folder with dataset_dict.json and a folder for each split. Source: datasets.arrow_dataset, datasets.dataset_dict.
"""

from __future__ import annotations

from typing import Any, Protocol

from training.data.row_errors import RowError
from training.io.foreign_files import loads
from training.io.paths import is_below

STATE, SPLITS = "state.json", "dataset_dict.json"


class Folder(Protocol):
    """A folder somewhere."""

    shown: str

    def names(self, inside: str = "") -> list[str]: ...

    def read(self, name: str) -> bytes: ...


def files_in(folder: Folder, split: str) -> list[str] | None:
    """The files with the rows of a split, in order, by their path in the folder;
    None if `save_to_disk` did not write it.

    Of a folder that holds one data set without splits, `split` must be "", "train" or the split that it was made from.
    Raises RowError for a split that there is not, and for rows that cannot be read from there.
    """
    names = folder.names()
    if SPLITS in names:
        splits = _json(folder, SPLITS).get("splits", [])
        if not (isinstance(splits, list) and all(isinstance(name, str) and is_below(name) for name in splits)):
            raise RowError(f"written by save_to_disk, and {SPLITS} names no splits; copy the folder again")
        inside = f"{_known(split, splits, folder)}/"
        return [inside + name for name in _arrow_files(folder, inside)]
    if STATE not in names or not any(name.endswith(".arrow") for name in names):
        return None
    made_from = _json(folder, STATE).get("_split")
    if split not in ("", "train", made_from):
        raise RowError(f"the folder holds one data set without splits, not `{split}`; leave `split` out")
    return _arrow_files(folder, "")


def _known(split: str, splits: list[str], folder: Folder) -> str:
    if split in splits:
        return split
    if not split and len(splits) == 1:
        return splits[0]
    problem = f"has no split `{split}`" if split else "has several splits"
    raise RowError(
        f"the folder {problem}; there are {', '.join(splits) or 'none'}: name one, "
        f"`{{path: {folder.shown}, split: {next(iter(splits), 'train')}}}`, or its folder"
    )


def _arrow_files(folder: Folder, inside: str) -> list[str]:
    """The names in a folder of one data set, which lies at `inside`."""
    state = _json(folder, f"{inside}{STATE}")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise RowError(
            "written by save_to_disk with rows selected by an index file; write it as Parquet: ds.to_parquet(...)"
        )
    entries = state.get("_data_files")
    names = (
        [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    if not names or not all(name.endswith(".arrow") and "/" not in name and is_below(name) for name in names):
        raise RowError(
            f"written by save_to_disk, and {inside}{STATE} names no Arrow files; write it as Parquet: "
            "ds.to_parquet(...)"
        )
    if lost := sorted(set(names) - set(folder.names(inside))):
        raise RowError(f"written by save_to_disk, and {inside}{lost[0]} is not there; copy the folder again")
    return names


def _json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        value = loads(folder.read(name))
    except (OSError, ValueError) as error:
        raise RowError(f"written by save_to_disk, and {name} cannot be read ({error}); copy the folder again") from None
    if not isinstance(value, dict):
        raise RowError(f"written by save_to_disk, and {name} is no object; copy the folder again")
    return value
