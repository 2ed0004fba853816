"""What the base is, from a config alone: a folder, a hub id, the built-in model."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.models import hub, shapes
from scalepeft.models.hub import BUILTIN, ModelConfig
from scalepeft.models.sources import DTYPES
from scalepeft.models.weights import Weights

ITEM_BYTES = {str(d).removeprefix("torch."): d.itemsize for d in DTYPES.values()}


@dataclass(frozen=True)
class Source:
    """The base's ``config.json`` and how its weights lie on the disk."""

    values: dict[str, Any]  # of ``config.json``
    where: str  # it came from, in words
    files: dict[str, int]  # bytes a number of each tensor in the folder's files; empty without

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.text["num_hidden_layers"])

    @property
    def text(self) -> dict[str, Any]:
        """The values of the decoder, which a multimodal model keeps apart."""
        return self.values.get("text_config") or self.values

    def item_bytes(self, tensor: str) -> int:
        """Bytes a number of a tensor on the disk; without files what ``config.json`` says."""
        dtype = self.values.get("dtype") or self.values.get("torch_dtype") or "bfloat16"
        return self.files.get(tensor, ITEM_BYTES.get(str(dtype), 2))

    @contextmanager
    def folder(self, layers: int) -> Iterator[Path]:
        """A folder whose ``config.json`` is that of the same model with so many blocks."""
        text = {
            # layer_types, mlp_layer_types, no_rope_layers: one for each block
            key: value[:layers] if isinstance(value, list) and len(value) == self.layers else value
            for key, value in self.text.items()
            if "layer" in key
        }
        text = {**self.text, **text, "num_hidden_layers": layers}
        nested = "text_config" in self.values and self.text is not self.values
        values = {**self.values, "text_config": text} if nested else text
        with tempfile.TemporaryDirectory(prefix="scalepeft-plan-") as name:
            (Path(name) / "config.json").write_text(json.dumps(values))
            yield Path(name)


def find(config: ModelConfig, network: bool = True) -> Source:
    """The base's dimensions without weights; ``network``: ask the hub too. Raises UserError."""
    folder = Path(config.path)
    if config.path == BUILTIN:
        from scalepeft.models import tiny

        return Source({"model_type": "llama", "dtype": "float32", **tiny.SPEC}, BUILTIN, {})
    if not folder.is_dir():
        hub.check_place(config.path)
        return _of_hub_id(config, network)
    entries = Weights(folder).entries if any(folder.glob("*.safetensors*")) else {}
    files = {name: entry.dtype.itemsize for name, entry in entries.items()}
    return _source(hub.architecture(folder), f"{folder}/config.json", files)


def _source(architecture: Any, where: str, files: dict[str, int] | None = None) -> Source:
    return Source(json.loads(architecture.to_json_string(use_diff=False)), where, files or {})


def _of_hub_id(config: ModelConfig, network: bool) -> Source:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name, revision = config.path, config.revision
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return _source(hub.architecture(Path(cached).parent), "the hub's cache")
    if (shape := shapes.of_hub_id(name)) is not None:
        return _source(shapes.architecture(shape), f"dimensions of {shape}")
    reason = "the hub is not asked here"
    if network:
        try:
            file = hf_hub_download(name, "config.json", revision=revision)
            return _source(hub.architecture(Path(file).parent), "the hub")
        except (OSError, ValueError) as error:  # also every error of the hub's own
            reason = f"the download failed ({type(error).__name__})"
    raise UserError(
        f"model.path={name}: its config.json is not in the hub's cache, its dimensions are not"
        f" known, and {reason}; set model.path=FOLDER (the model's config.json is enough)"
    )
