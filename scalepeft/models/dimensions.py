"""What the base is, from a config alone: a folder, a hub id, the built-in model."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.models import hub as models
from scalepeft.models import shapes
from scalepeft.models.hub import BUILTIN, ModelConfig
from scalepeft.models.weights import DTYPES, Weights

ITEM_BYTES = {str(d).removeprefix("torch."): d.itemsize for d in DTYPES.values()}


@dataclass(frozen=True)
class Source:
    """The base's ``config.json`` and how its weights lie on the disk.

    Attributes:
        values: of ``config.json``.
        where: it came from, in words.
        files: bytes a number of each tensor that the folder's files hold; empty without files.
    """

    values: dict[str, Any]
    where: str
    files: dict[str, int]

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.values["num_hidden_layers"])

    def item_bytes(self, tensor: str) -> int:
        """Bytes a number of a tensor on the disk; without files what ``config.json`` says."""
        dtype = self.values.get("dtype") or self.values.get("torch_dtype") or "bfloat16"
        return self.files.get(tensor, ITEM_BYTES.get(str(dtype), 2))

    @contextmanager
    def folder(self, layers: int) -> Iterator[Path]:
        """A folder whose ``config.json`` is that of the same model with so many blocks."""
        values = {**self.values, "num_hidden_layers": layers}
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][:layers]
        with tempfile.TemporaryDirectory(prefix="scalepeft-plan-") as name:
            (Path(name) / "config.json").write_text(json.dumps(values))
            yield Path(name)


def find(config: ModelConfig, network: bool = True) -> Source:
    """Find the base's dimensions without its weights.

    Args:
        config: ``model`` of the run.
        network: whether the hub may be asked.

    Raises:
        UserError: neither a folder with ``config.json`` nor a hub id whose dimensions can be had.
    """
    if config.path == BUILTIN:
        from scalepeft.models import tiny

        values = {"model_type": "llama", "dtype": "float32", **tiny.SPEC}
        return Source(values, BUILTIN, {})
    if Path(config.path).is_dir():
        folder = Path(config.path)
        files: dict[str, int] = {}
        if any(folder.glob("*.safetensors*")):
            entries = Weights(folder).entries
            files = {name: entry.dtype.itemsize for name, entry in entries.items()}
        return Source(_values(models.architecture(folder)), f"{folder}/config.json", files)
    models.check_place(config.path)
    return _of_hub_id(config, network)


def _values(architecture: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(architecture.to_json_string(use_diff=False))
    return values


def _of_hub_id(config: ModelConfig, network: bool) -> Source:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name = config.path
    cached = try_to_load_from_cache(name, "config.json", revision=config.revision)
    if isinstance(cached, str):
        return Source(_values(models.architecture(Path(cached).parent)), "the hub's cache", {})
    if (shape := shapes.of_hub_id(name)) is not None:
        return Source(_values(shapes.architecture(shape)), f"dimensions of {shape}", {})
    reason = "the hub is not asked here"
    if network:
        try:
            file = hf_hub_download(name, "config.json", revision=config.revision)
            return Source(_values(models.architecture(Path(file).parent)), "the hub", {})
        except (OSError, ValueError) as error:  # also every error of the hub's own
            reason = f"the download failed ({type(error).__name__})"
    raise UserError(
        f"model.path={name}: its config.json is not in the hub's cache, its dimensions are not"
        f" known here, and {reason}; set model.path=FOLDER, one with the model's config.json is"
        " enough"
    )
