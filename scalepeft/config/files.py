"""YAML files and ``dotted.key=value`` arguments to nested values."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scalepeft.config import schema as cfg
from scalepeft.core import registry
from scalepeft.core.errors import UserError, nearest, unknown
from scalepeft.core.files import read_mapping, shipped
from scalepeft.core.log import say
from scalepeft.core.text import one_line

MAX_KEYS = 2000
FOLDERS = {"adapter": "adapters", "engine": "engines", "model": "models", "data": "tasks"}


def config_first(settings: list[str]) -> tuple[str | None, list[str]]:
    """Split ``[CONFIG] KEY=VALUE ...`` into the config, if one is named, and the settings."""
    if settings and "=" not in settings[0]:
        return settings[0], settings[1:]
    return None, settings


def config_root() -> Path:
    """The folder of the shipped YAML files."""
    return shipped("configs")


def load(path: str | None, overrides: list[str]) -> tuple[cfg.RunConfig, list[str]]:
    """A run's config, and the notes the user should see. Raises UserError: one line a mistake."""
    notes: list[str] = []
    return cfg.from_dict(values_of(path, overrides, notes)), notes


def load_partly(settings: list[str]) -> cfg.RunConfig:
    """The config of ``[CONFIG] KEY=VALUE ...``, notes said; run folder and length may be absent."""
    notes: list[str] = []
    values = values_of(*config_first(settings), notes)
    train = values["train"] = dict(values.get("train") or {})
    if train.get("max_steps") is None and train.get("epochs") is None:
        train["epochs"] = 1.0
    config = cfg.from_dict({**values, "run_dir": values.get("run_dir") or "unset"})
    for note in notes:
        say(note)
    return config


def values_of(path: str | None, overrides: list[str], notes: list[str]) -> dict[str, Any]:
    """Settings of a file and the command line, not checked yet. Raises UserError: unreadable."""
    # Precedence, weakest first: 1 the dataclass defaults (fill what is absent), 2 the file and its
    # includes (a file over what it includes), 3 the command line, left to right.
    values: dict[str, Any] = {}
    if path:
        named = [config_root() / part / f"{path}.yaml" for part in ("runs", "recipes")]
        values = _read(_first_file(Path(path), Path(f"{path}.yaml"), *named) or Path(path))
    return _merge(_apply(values, overrides, notes), resolve=True)


def overlay(values: dict[str, Any], overrides: list[str]) -> cfg.RunConfig:
    """Lay ``key=value`` arguments over a run's config."""
    merged = _merge(_apply(_as_text(cfg.renamed(values)), overrides, []), resolve=True)
    return cfg.from_dict(merged, saved=True)


def _merge(*layers: dict[str, Any], resolve: bool = False) -> dict[str, Any]:
    """Later layers over earlier ones, but for empty sections; ``resolve`` fills in ``${...}``."""
    filled = [
        {k: v for k, v in d.items() if v is not None or k not in cfg.SECTIONS} for d in layers
    ]
    try:
        return OmegaConf.to_container(OmegaConf.merge(*filled), resolve=resolve)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(
            f"{error.full_key}: {str(error).splitlines()[0].rstrip('.')}; set it, or what ${{...}}"
            " names (a key, or ${oc.env:NAME}); as text it is written \\${...}"
        ) from None


def _as_text(values: Any) -> Any:
    """Resolved values in which ``${`` is text and stays so."""
    return json.loads(re.sub(r"(\\*)\$\{", r"\1\1\\\\${", json.dumps(values, default=str)))


def _first_file(*candidates: Path) -> Path | None:
    return next((path for path in candidates if os.path.isfile(path)), None)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over what it includes and names."""
    if path.resolve() in above:
        raise UserError(f"{path} includes itself by way of {', '.join(p.name for p in above)}")
    values = _parsed(path)
    cfg.use_extensions(values.get("extensions"))  # first: they bring names of their own
    merged: dict[str, Any] = {}
    includes = values.pop("include", None) or []
    for include in includes if isinstance(includes, list) else [includes]:
        beside, name = path.parent, f"{include}.yaml"
        file = _first_file(beside / name, config_root() / name, beside / str(include))
        if file is None:
            raise UserError(
                f"{path}: include '{include}': no such file beside it or in {config_root()}"
            )
        merged = _merge(merged, _read(file, (*above, path.resolve())))
    named = {s: values.pop(s) for s in FOLDERS if isinstance(values.get(s), str)}
    for section, name in named.items():  # first: what this file itself sets is over what it names
        merged.pop(section, None)  # whole, as on the command line
        merged = _merge(merged, named_file(section, name))
    cfg.check_sections(values, f"{path}: ")
    return _merge(merged, values)


def _parsed(path: Path) -> dict[str, Any]:
    """The settings of one file, alone."""
    if not os.path.isfile(path):  # Path.is_file raises for a long name
        ours = sorted(file.stem for file in config_root().glob("r*/*.yaml"))  # runs, recipes
        raise UserError(
            f"no config file {path} (from {Path.cwd()}).{nearest(path.stem, ours)} The"
            f" {len(ours)} shipped ones: scalepeft init --list"
        )

    def parse(text: str) -> object:
        values = parse_yaml(text)
        if text.startswith(cfg.RESOLVED):
            return _as_text(values)
        return OmegaConf.to_container(OmegaConf.create(text))

    remedy = f"expected {', '.join(cfg.SECTIONS)}, each with its keys; as text ${{ is written \\${{"
    values = read_mapping(path, parse, remedy)
    return cfg.renamed({str(key): value for key, value in values.items()})


def config_files(section: str) -> list[Path]:
    """The YAML files, shipped or of extensions, that ``section=NAME`` can take."""
    cfg.use_extensions(None)
    roots = [config_root(), *(folder / "configs" for folder in registry.extension_folders())]
    return [file for root in roots for file in sorted((root / FOLDERS[section]).glob("*.yaml"))]


def config_names(section: str) -> list[str]:
    """Every name that ``section=NAME`` can take: of a file, or of an extension's entry."""
    entries = registry.added(cfg.NAMED[section][0]) if section in cfg.NAMED else []
    return sorted({*(file.stem for file in config_files(section)), *entries})


def named_file(section: str, name: str) -> dict[str, Any]:
    """The file of ``section=name``, or an entry's defaults. Raises UserError: no such name."""
    file = next((file for file in config_files(section) if file.stem == name), None)
    if file is not None:
        return _read(file)
    if name not in config_names(section):
        raise unknown(f"{section} config", name, config_names(section))
    return {section: {"name": name}}


def _apply(values: dict[str, Any], overrides: list[str], notes: list[str]) -> dict[str, Any]:
    """Lay arguments over ``values``; ``adapter=lora`` replaces the section by a file's."""
    keys: dict[str, Any] = {}
    folders = [o.partition("=")[2] for o in overrides if o.startswith("extensions=")]
    cfg.use_extensions(folders[-1] if folders else values.get("extensions"))
    for override in overrides:
        section, key, text = _split(override)
        if key is not None:
            held = keys.get(section)
            keys[section] = {**(held if isinstance(held, dict) else {}), key: _value(text)}
        elif section in cfg.TOP:
            keys[section] = text if section == "run_dir" else _value(text)
        else:
            named = named_file(section, text)
            others = {k: v for k, v in named.items() if k not in (section, *cfg.TOP)}
            notes += [
                f"{override} also sets {s}.{k}={v}" for s in others for k, v in others[s].items()
            ]
            for key in keys.pop(section, {}):  # no path or rank of another survives
                notes.append(f"{override} takes back {section}.{key}, which stands before it")
            values = _merge({k: v for k, v in values.items() if k != section}, named)
    train, below = keys.get("train", {}), values.get("train") or {}
    for key, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if train.get(key) is not None and other not in train and below.get(other) is not None:
            notes.append(f"train.{key}={train[key]} replaces train.{other}={below[other]}")
            values = _merge(values, {"train": {other: None}})
    return _merge(values, keys)


def _split(override: str) -> tuple[str, str | None, str]:
    """Parts ``section.key=text``; the key of ``section=text`` is None."""
    name, equals, text = override.partition("=")
    section, *key = cfg.renamed_key(name).split(".")
    if not equals or not all((section, *key)) or len(key) > 1:
        raise UserError(
            f"'{override}': expected section.key=value, e.g. train.lr=1e-4 or adapter=hoft"
        )
    if not text:
        raise UserError(
            f"'{override}': nothing stands after the equals sign (an empty variable?); for no"
            f" value write {name}=null, for an empty text {name}='\"\"'"
        )
    if key or section not in FOLDERS:
        cfg.check_sections({section: {} if key else text}, f"{override}: ")
    return section, key[0] if key else None, text


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, in which a date is text. Raises ValueError and nothing else."""
    if text.count(":") > MAX_KEYS:  # each takes OmegaConf a millisecond
        raise ValueError(f"more than {MAX_KEYS} keys")
    try:
        return yaml.load(text, _Plain)
    except Exception as error:  # what its constructors stumble over, too
        raise ValueError(one_line(error)) from None


class _Plain(yaml.SafeLoader): ...


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith("timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _value(text: str) -> Any:
    """What a user means who types it: YAML, as far as that keeps the text."""
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    if not isinstance(value, str | bool | list | None) and str(value) != text:
        return text  # {instruction} is no mapping, revision 0123 no octal number
    return value
