"""The base as one object: where its files come from, its architecture, tokenizer and weights."""

import json
import os
import re
import time
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides, NotNegative
from scalepeft.core.files import kept_digest, read_mapping
from scalepeft.core.launch import importing
from scalepeft.core.log import say
from scalepeft.core.text import duration, one_line, size
from scalepeft.data.tables import FETCH
from scalepeft.data.token_file import tokenizer_hash
from scalepeft.models.weights import Weights
from scalepeft.parallel.ranks import Ranks

BUILTIN = "builtin:tiny"
SAY_AFTER = 10.0  # seconds that the sha256 of a base's files may take in silence
Attention = Literal[
    "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The frozen base.

    Attributes:
        path: folder with config.json and safetensors, a hub id, or ``builtin:tiny`` (made on the
            spot).
        revision: branch, tag or commit of a hub id.
        tokenizer: folder or hub id, where it is not that of the model.
        quant: how block weights are held: ``none`` (the compute dtype), ``nf4``, ``int8``.
        double_quant: NF4 scales in 8 bits too, 4.13 instead of 4.5 bits a weight.
        quantized_cache: folder for copies of what was quantized, which the next start reads in the
            base's place; ``auto``: in ``$SCALEPEFT_CACHE``, where that is set, from 1 GiB on;
            ``off`` (false): none.
        stage: folder on each node's own disk, to which one rank brings base or quantized copy for
            the others; ``auto``: ``$SCALEPEFT_STAGE``, where that is set; ``off`` (false): none.
        attention: who computes attention; ``auto``: sdpa where the model's class supports it, else
            eager.
        pretrain_steps: next-token steps on the toy task's text that the built-in model gets when
            made.
        unexpected: tensors of the files that the model does not have: ``error`` stops, ``ignore``
            leaves them out, as transformers does.
    """

    path: Annotated[str, Decides.PLACE] = BUILTIN
    revision: Annotated[str | None, Decides.PLACE] = None
    tokenizer: Annotated[str | None, Decides.TOKENS] = None
    quant: Annotated[Literal["none", "nf4", "int8"], Decides.TRAINING] = "none"
    double_quant: Annotated[bool, Decides.TRAINING] = False
    quantized_cache: Annotated[str | Literal[False], Decides.PLACE] = "auto"
    stage: Annotated[str | Literal[False], Decides.PLACE] = "auto"
    attention: Annotated[Attention, Decides.SPEED] = "auto"
    pretrain_steps: Annotated[NotNegative, Decides.TRAINING] = 0
    unexpected: Annotated[Literal["error", "ignore"], Decides.PLACE] = "error"


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Base:
    """A frozen base in ``folder`` on this node; a part is read when first asked for (UserError)."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._digests: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """What others load it by; of the built-in one the folder in which it was made."""
        return str(self.folder) if self.config.path == BUILTIN else self.config.path

    @cached_property
    def architecture(self) -> Any:
        """The transformers config."""
        return architecture(self.folder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the embedding has."""
        return int(self.architecture.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """As ``positions`` says."""
        return positions(self.architecture)

    @cached_property
    def tokenizer(self) -> Any:
        """As ``load_tokenizer`` returns it."""
        return load_tokenizer(self.config, self.folder)

    @cached_property
    def ends(self) -> list[int]:
        """EOS of the tokenizer, then those of generation_config.json, or else of config.json."""
        config, file = self.architecture.get_text_config(), self.folder / "generation_config.json"
        remedy = "copy it again, or remove it"
        known = read_mapping(file, json.loads, remedy) if file.is_file() else vars(config)
        found = known.get("eos_token_id")
        more = found if isinstance(found, list) else [found]
        ids = [i for i in more if isinstance(i, int) and 0 <= i < self.vocab_size]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *ids]))

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 of the tokenizer's full definition."""
        return tokenizer_hash(self.tokenizer)

    @cached_property
    def weights(self) -> Weights:
        """The tensors of the files, read by ranges."""
        return Weights(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what tells one base from another."""
        return self.weights.fingerprint()

    def digests(self, ranks: Ranks) -> dict[str, str]:
        """sha256 of each shard by name; a collective when it is first asked for."""
        if self._digests is None:
            files = [file.path for file in ranks.all_or_raise(lambda: self.weights).files]
            self._digests = shard_digests(files, ranks)
        return self._digests

    def check_same(self, recorded: dict[str, Any], who: str, ranks: Ranks) -> None:
        """Raises UserError if ``who`` was not trained over this base (``recorded``); collective."""
        where, now = f"model.path={self.config.path}", self.digests(ranks)
        held: Any = recorded.get("sha256")
        known = isinstance(held, dict) and held.keys() == now.keys()  # else fingerprints differ too
        if damaged := [name for name in now if known and held[name] != now[name]]:
            raise UserError(
                f"{where}: {', '.join(damaged[:4])}: other bytes than those that {who} was trained"
                " over (sha256): damaged or replaced; copy the base again"
            )
        if ranks.all_or_raise(lambda: self.fingerprint) != recorded.get("fingerprint"):
            raise UserError(
                f"{who} was trained on another base than {where} now holds (the fingerprint of its"
                " files differs); name the folder of that base with model.path=FOLDER"
            )


def shard_digests(paths: list[Path], ranks: Ranks) -> dict[str, str]:
    """sha256 of each file by name, read by one of the ranks that see it, whichever nodes they are
    on, and kept. A collective. Raises UserError: a file is not the hub's, or differs between nodes.
    """
    began = time.monotonic()
    stats = ranks.all_or_raise(lambda: [path.stat() for path in paths])
    # They change with the bytes: ctime too, as mtime can be set back.
    keys = [[s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats]
    everyone = ranks.gather(dict(zip((path.name for path in paths), keys, strict=True)))

    def work() -> dict[str, str]:
        made = {}
        for i, (path, key) in enumerate(zip(paths, keys, strict=True)):
            same = [r for r, theirs in enumerate(everyone) if theirs.get(path.name) == key]
            if same[i % len(same)] == ranks.rank:
                made[json.dumps([path.name, *key])] = _digest(path)
        return made

    known = {k: v for made in ranks.gather(ranks.all_or_raise(work)) for k, v in made.items()}
    for name in everyone[0]:
        theirs = [known.get(json.dumps([name, *rank[name]])) if name in rank else None
                  for rank in everyone]  # fmt: skip
        if others := [rank for rank, value in enumerate(theirs) if value != theirs[0]]:
            raise UserError(f"{paths[0].parent / name}: differs between rank 0 and ranks {others};"
                            " give every node the same copy")  # fmt: skip
    seconds = time.monotonic() - began
    if ranks.is_main and seconds > SAY_AFTER:
        total = size(sum(stat.st_size for stat in stats))
        say(f"sha256 of the base's {len(paths)} files ({total}) in {duration(seconds)}; kept")
    return {p.name: known[json.dumps([p.name, *k])] for p, k in zip(paths, keys, strict=True)}


def _digest(path: Path) -> str:
    real, found = path.resolve(), kept_digest(path)
    # In the hub's cache the name of a large file is the sha256 that the hub has of it.
    of_the_hub = real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name)
    if of_the_hub and real.name != found:
        raise UserError(f"{path}: damaged: its sha256 is not the hub's ({real.name[:12]}...);"
                        f" remove {real} and download it again")  # fmt: skip
    return found


def open_base(config: ModelConfig, ranks: Ranks) -> Base:
    """Opens the base in a folder on this node: given, built in (made now), or downloaded once a
    node; a collective. Raises UserError: no such folder, nothing to read in it, or no such hub id.
    """

    def make() -> str | None:
        if ranks.local_rank != 0:
            return None
        if config.path == BUILTIN:
            from scalepeft.models import tiny

            return str(tiny.make(config.pretrain_steps))
        if Path(config.path).is_dir():
            return config.path
        return _download(config.path, config.revision)

    return Base(config, Path(ranks.of_node(ranks.all_or_raise(make))))  # node paths may differ


def check_place(name: str) -> None:
    """Refuses a ``model.path`` that can be neither a folder nor a hub id; looks at no network."""
    if name == BUILTIN or Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        neither = f"no such folder (from {Path.cwd()}), and not a hub id (ORG/NAME)"
        raise UserError(f"model.path={name}: {neither}")


def _download(name: str, revision: str | None) -> str:
    check_place(name)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the hub's own, its HTTP client's, the disk's: no common base
        where = f"model.path={name}" + f" at revision {revision}" * bool(revision)
        failed = f"{where}: no such folder here, and the download from the hub failed"
        reason = one_line(f"{type(error).__name__}: {error}")
        remedy = "check the name; for a gated one, hf auth login; or name the folder of a copy"
        raise UserError(unfetched(where) or f"{failed} ({reason}); {remedy}") from None


def unfetched(where: str) -> str:
    """What is said of ``where`` if it is not in the hub's cache; empty unless the hub is off."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return f"{where}: not fetched, and HF_HUB_OFFLINE is set: {FETCH}" if offline else ""


@importing()
def load_tokenizer(config: ModelConfig, folder: Path) -> Any:
    """The tokenizer. Raises UserError: none, tokenizer.model alone, or no end-of-text token."""
    from transformers import AutoTokenizer

    source = config.tokenizer or str(folder)
    where = f"model.tokenizer={source}" if config.tokenizer else f"model.path={folder}"
    if Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file():
        what = "no tokenizer.json there; set model.tokenizer=FOLDER_OR_HUB_ID"
        if (Path(source) / "tokenizer.model").is_file():  # alone it gives no BOS and other ids
            what = "has tokenizer.model but no tokenizer.json; convert it once, with transformers'"
            what += " convert_slow_tokenizer"
        raise UserError(f"{where}: {what}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # for a damaged file the tokenizers library raises a bare Exception
        reason = f"{where}: no tokenizer can be loaded: {type(error).__name__}: {_reason(error)}"
        raise UserError((not Path(source).is_dir() and unfetched(where)) or reason) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: no end-of-text token; set eos_token in tokenizer_config.json")
    return tokenizer


@importing()
def architecture(folder: Path) -> Any:
    """Reads the transformers config of a model folder. Raises UserError: missing or broken."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={folder}: no config.json there; name a whole model's folder")
    try:
        return _without_bad_pad(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # whatever transformers' own checks stumble over
        raise UserError(f"model.path={folder}: config.json: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Its text in one line; that code of the base's own would be needed, in words of ours."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        text = "needs Python code that lies beside the weights (auto_map), which is never run here;"
        return f"{text} name a base whose architecture transformers itself has"
    return f"transformers does not know {text}" if isinstance(error, KeyError) else text


def positions(config: Any) -> int | None:
    """Number of positions a transformers config is for, its RoPE's scaling included, or None."""
    text = config.get_text_config()
    known: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if known and rope.get("rope_type") in ("linear", "dynamic", "yarn"):  # others: known has it
        original = rope.get("original_max_position_embeddings") or known
        known = max(known, int(original * (rope.get("factor") or 1)))
    return known


def _without_bad_pad(config: Any) -> Any:
    """Drops padding ids beyond the vocabulary, which torch refuses to make an embedding with."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        size = getattr(part, "vocab_size", None) or config.get_text_config().vocab_size
        if isinstance(pad := getattr(part, "pad_token_id", None), int) and not 0 <= pad < size:
            part.pad_token_id = None
    return config


@importing()
def meta_model(config: Any, where: str, **options: Any) -> Any:
    """Returns the causal LM of a transformers config on the meta device; UserError if it cannot."""
    import transformers

    multimodal = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = "ImageTextToText" if multimodal else "CausalLM"
    try:
        with torch.device("meta"):
            made_by = getattr(transformers, f"AutoModelFor{kind}")
            return made_by.from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # torch's too: sizes that no layer can have
        raise UserError(f"{where}: {_reason(error)}") from None
