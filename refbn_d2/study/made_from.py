"""Remember what a study's derived sets were made from, to refuse those of other settings."""

import json
from collections.abc import Mapping
from pathlib import Path

from refbn_d2.study.spec import Study
from refbn_d2.utils.errors import ConfigError, DataError
from refbn_d2.utils.file_io import write_text

NAME = "made_from.json"


def check_made_from(
    folder: Path, study: Study, digests: Mapping[str, str], field: str, hold_out: bool
) -> None:
    """Write NAME: {"train", "test", "corrupted": what these sets are made from}.

    Sets without a record are of an older version, and are accepted.

    Args:
        folder: the folder of the derived sets.
        digests: {"train", "test": hash of the source set}.
        field: the name of a picture's domain in a COCO json.
        hold_out: whether a training set without a domain is derived.

    Raises:
        ConfigError: the folder holds sets that were made from something else; names the difference.
        DataError: the record cannot be read.
    """
    data, evaluate = study.data, study.evaluate
    common = {"tuning": data.tuning, "domain field": field}
    train = common | {"source": digests["train"], "train_images": data.train_images}
    source = digests["train" if data.tuning else "test"]
    test = common | {"source": source, "test_images": data.test_images}
    now = {}
    if data.train_images or data.tuning or hold_out:
        now["train"] = train
    if data.test_images or data.tuning:
        now["test"] = test
    if evaluate.corruptions:
        now["corrupted"] = test | {"corruptions.images": evaluate.images}
    if not now:
        return
    file = folder / NAME
    try:
        before = json.loads(file.read_text()) if _sets_in(folder) and file.exists() else {}
        changed = [
            f"{part}: {key}: {before[part].get(key)!r} there, {value!r} now"
            for part in now.keys() & before.keys()
            for key, value in now[part].items()
            if before[part].get(key) != value
        ]
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is broken ({error}); delete {folder}") from error
    if changed:
        raise ConfigError(
            f"{folder} holds sets that were made from other data or settings "
            f"({'; '.join(sorted(changed))}); delete that folder, or give another --output-dir"
        )
    if before | now != before:
        write_text(file, json.dumps(before | now, indent=1))


def _sets_in(folder: Path) -> bool:
    """Return whether the folder has more than a record, whose sets could not be made."""
    return folder.is_dir() and any(path.name != NAME for path in folder.iterdir())
