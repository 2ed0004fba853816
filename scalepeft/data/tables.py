"""Rows that other libraries keep: parquet, arrow, folders of ``save_to_disk``, sets of the hub."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError, unknown
from scalepeft.core.files import read_json, read_mapping

MAGIC = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # the last begins a stream of arrow
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
BATCH = 256  # rows made Python objects at a time
CONVERTED = "refs/convert/parquet"  # the hub's own copy of a set: CONFIG/SPLIT/*.parquet
FETCHED = "scalepeft-fetched.json"  # in HF_HOME: what ``scalepeft fetch`` has brought
FETCH = "run scalepeft fetch with these settings where there is a network (docs/offline.md)"
REMEDIES = {
    "scripts are no longer supported": "the code of a data set is never run: name its data files,"
    f" or the copy in parquet that the hub makes, hf://DATASET@{CONVERTED}:CONFIG:SPLIT",
    "gated|cannot be accessed": "check the name; for a gated set, hf auth login (or HF_TOKEN) with"
    " an account that may read it",
    "[Oo]ffline|Couldn't reach|Couldn't find cache|Cache directory": FETCH,
}
"""What datasets says -> what to do."""


@contextmanager
def explained(source: str, remedy: str = "") -> Iterator[None]:
    """Raise UserError, one line with the remedy, for whatever a library raises inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every library has its own
        # "An error occurred while generating the dataset" says nothing: its cause does.
        cause = error.__cause__ if "generating the dataset" in str(error) else error
        text = " ".join(str(cause).split("\nExample of usage")[0].split())
        script = next(Path(hub_name(source)[0]).glob("*.py"), None)
        if "data files" in text and script:
            text = f"Dataset scripts are no longer supported, but found {script.name}"
        remedy = next((f"; {r}" for said, r in REMEDIES.items() if re.search(said, text)), remedy)
        text = text[:300] or type(cause).__name__
        raise UserError(f"{source}: cannot be read: {text}{remedy}") from None


def hub_name(source: str) -> tuple[str, str, str, str]:
    """(name or folder, revision, config, split) of ``hf://NAME[@REVISION][:CONFIG[:SPLIT]]``."""
    name, config, split, *_ = [*source.removeprefix("hf://").split(":", 2), "", ""]
    name, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    return name, revision, config, split


def saved(source: str) -> list[Path] | None:
    """Arrow files of a ``save_to_disk`` FOLDER[:SPLIT], or None. Raises UserError: no split."""
    if source.startswith("hf://"):
        name, _, _, split = hub_name(source)
    else:
        name, _, split = (source, "", "") if Path(source).exists() else source.rpartition(":")
    folder = Path(name or "/dev/null")
    if (folder / "dataset_dict.json").is_file():
        listed = _listed(folder / "dataset_dict.json", lambda held: held["splits"])
        split = split or (listed[0] if len(listed) == 1 else "")
        if not split:
            raise UserError(f"{name}: name one of its splits, {name}:SPLIT; {', '.join(listed)}")
        if split not in listed:
            raise UserError(f"{source}: {unknown('split', split, listed)}")
        folder, split = folder / split, ""
    if not (folder / "state.json").is_file():
        return None
    if split:
        raise UserError(f"{source}: the set has no splits; name it as {name}")
    files = _listed(
        folder / "state.json", lambda held: [f["filename"] for f in held["_data_files"]]
    )
    return [folder / file for file in files]


def _listed(file: Path, find: Callable[[Any], list[str]]) -> list[str]:
    made = read_mapping(file, lambda text: {"": find(json.loads(text))}, "save the set again")
    return list(map(str, made[""]))


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet or arrow file. Raises UserError: unreadable, cut, or a column twice."""
    with explained(str(file), "; copy it again"):
        for batch in _batches(file):
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise UserError(f"{file}: a column appears twice in {batch.schema.names}")
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow  # slow to import, and only these files need it
    from pyarrow import parquet

    with file.open("rb") as f:
        head = f.read(6)
    if head[:4] == b"PAR1":
        held = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)  # else the whole file
        yield from held.iter_batches(BATCH)
        return
    with pyarrow.memory_map(str(file)) as mapped:
        if head == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            yield from map(reader.get_batch, range(reader.num_record_batches))
            return
        yield from pyarrow.ipc.open_stream(mapped)
        mapped.seek(mapped.size() - len(STREAM_END))
        if mapped.read() != STREAM_END:  # a file cut between two batches reads as a shorter one
            raise UserError(f"{file}: ends without an end mark: it was cut; copy it again")


def builder(source: str) -> tuple[Any, str]:
    """What ``datasets`` knows of a set unread, and the split. Raises UserError: none, or no hub."""
    name, revision, config, split = hub_name(source)
    split = split or "train"
    if not name:
        raise UserError(f"{source}: names no data set; expected hf://DATASET[:CONFIG[:SPLIT]]")
    import datasets  # slow to import, and only hub sources need it
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.csv.csv import Csv

    with explained(source):
        held = read_json(Path(datasets.config.HF_CACHE_HOME) / FETCHED).get("fetched", {})
        if datasets.config.HF_HUB_OFFLINE and source in held:  # else the newest, of any revision
            return Cache(**held[source]["builder"]), split
        if revision == CONVERTED:
            base = split.partition("[")[0]
            files = f"hf://datasets/{name}@{revision}/{config or 'default'}/{base}/*.parquet"
            return datasets.load_dataset_builder("parquet", data_files={base: files}), split
        named: dict[str, Any] = {"path": name, "name": config or None, "revision": revision or None}
        found = datasets.load_dataset_builder(**named)
        if isinstance(found, Csv) and found.config.features is None:  # else true is a truth value
            first = next(iter(next(iter(found.as_streaming_dataset().values()))))
            texts = datasets.Features({key: datasets.Value("string") for key in first})
            named |= {"features": texts, "keep_default_na": False}
            found = datasets.load_dataset_builder(**named)
        if revision and found.name == "cache":
            raise ConnectionError("Couldn't reach the hub, and the cache names no revision")
        return found, split


def prepared(made: Any, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a set as ``datasets`` reads it, without sound and images."""
    import datasets

    made.download_and_prepare()
    found = made.as_dataset(split=split)
    media = (datasets.Audio, datasets.Image, datasets.Video)
    heavy = [key for key, kind in found.features.items() if isinstance(kind, media)]
    yield from found.remove_columns(heavy)  # CoVoST's sound would be decoded row by row
