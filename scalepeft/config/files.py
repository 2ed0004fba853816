"""YAML files and ``dotted.key=value`` arguments to nested values."""

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scalepeft.config.schema import (
    NAMED,
    RESOLVED,
    SECTIONS,
    TOP,
    RunConfig,
    config_class,
    from_dict,
    renamed,
    renamed_key,
    use_extensions,
)
from scalepeft.core import registry
from scalepeft.core.errors import UserError, nearest, unknown
from scalepeft.core.fields import field_names


def config_first(settings: list[str]) -> tuple[str | None, list[str]]:
    """Split ``[CONFIG] KEY=VALUE ...`` into the config, if one is named, and the settings."""
    if settings and "=" not in settings[0]:
        return settings[0], settings[1:]
    return None, settings


FOLDERS = {"adapter": "adapters", "engine": "engines", "model": "models", "data": "tasks"}


def config_root() -> Path:
    """The folder of the shipped YAML files: inside an installed package, or beside it in a
    checkout.
    """
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(path: str | None, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    """Builds a run's config; returns it with the notes the user should see.

    Raises:
        UserError: one line with the dotted path, the value, what is allowed, the nearest name.
    """
    notes: list[str] = []
    return from_dict(values_of(path, overrides, notes)), notes


def values_of(path: str | None, overrides: list[str], notes: list[str]) -> dict[str, Any]:
    """The settings of a file and of the command line, by section, before they are checked.

    Raises:
        UserError: a file that cannot be read, a setting that is none.
    """
    # Precedence, weakest first: 1 the dataclass defaults (fill what is absent), 2 the file and its
    # includes (a file over what it includes), 3 the command line, left to right.
    return _resolved(_apply(_read(_config_file(path), ()) if path else {}, overrides, notes))


def overlay(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    """Lays ``key=value`` arguments over a resolved config."""
    return from_dict(_resolved(_apply(_as_text(renamed(values)), overrides, [])))


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Fills in every ``${...}``: another key of the config, or ``oc.env:NAME``."""
    try:
        return _plain(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise _unresolved(error) from None


def _unresolved(error: OmegaConfBaseException) -> UserError:
    return UserError(
        f"{error.full_key}: {_first_line(error)}; ${{...}} names a key that the files or the"
        " command line set, or ${oc.env:NAME}; as text it is written \\${...}"
    )


def _as_text(value: Any) -> Any:
    """A resolved value in which ``${`` is text and stays so."""
    if isinstance(value, dict):
        return {k: _as_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_as_text(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers over earlier ones, key by key; an empty section (``train:``) changes nothing."""
    kept = [{k: v for k, v in d.items() if v is not None or k not in SECTIONS} for d in layers]
    try:
        return _plain(OmegaConf.merge(*kept))
    except OmegaConfBaseException as error:
        raise _unresolved(error) from None


def _plain(config: Any, resolve: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = OmegaConf.to_container(config, resolve=resolve)  # type: ignore[assignment]
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _config_file(name: str) -> Path:
    """CONFIG of the command line: a file, with or without its suffix, or one of configs/runs."""
    path = Path(name)
    candidates = [path, Path(f"{name}.yaml"), config_root() / "runs" / f"{name}.yaml"]
    return next((c for c in candidates if c.is_file()), path)


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file over what it includes and names."""
    if path.resolve() in above:
        raise UserError(f"{path} includes itself by way of {', '.join(p.name for p in above)}")
    values = _parsed(path)
    use_extensions(values.get("extensions"))  # first: they bring names of their own
    merged: dict[str, Any] = {}
    includes = values.pop("include", None) or []
    for include in includes if isinstance(includes, list) else [includes]:
        candidates = [
            path.parent / f"{include}.yaml",
            config_root() / f"{include}.yaml",
            path.parent / str(include),
        ]
        found = next((c for c in candidates if c.is_file()), None)
        if found is None:
            raise UserError(
                f"{path}: include '{include}': no such file beside it or in {config_root()}"
            )
        merged = _merge(merged, _read(found, (*above, path.resolve())))
    named = {s: v for s, v in values.items() if s in FOLDERS and isinstance(v, str)}
    for section, name in named.items():  # first: what this file itself sets is over what it names
        merged.pop(section, None)  # whole, as on the command line
        merged = _merge(merged, named_file(section, name))
    rest = {s: v for s, v in values.items() if s not in named}
    for section, value in rest.items():
        if section in SECTIONS and section not in TOP and not isinstance(value, dict | None):
            raise UserError(f"{path}: {section}: expected keys under it, not {value!r}")
    return _merge(merged, rest)


def _parsed(path: Path) -> dict[str, Any]:
    """The settings of one file, alone."""
    if not path.is_file():
        shipped = sorted(file.stem for file in (config_root() / "runs").glob("*.yaml"))
        raise UserError(
            f"no config file {path} (from {Path.cwd()}).{nearest(path.stem, shipped)} The shipped"
            f" ones are {', '.join(shipped)}, in {config_root()}/runs"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(RESOLVED):
            return renamed(_as_text(yaml.safe_load(text)))
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key or 'a key'}: {_first_line(error)}") from None
    except OSError as error:
        reason = error.strerror or "it holds one value, expected sections"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a config is a mapping with {', '.join(SECTIONS)}, not {type(values).__name__}"
        )
    return renamed({str(key): value for key, value in values.items()})


def config_files(section: str) -> list[Path]:
    """The YAML files, shipped or of extensions, that ``section=NAME`` can take."""
    use_extensions(None)
    roots = [config_root(), *(folder / "configs" for folder in registry.extension_folders())]
    return [file for root in roots for file in sorted((root / FOLDERS[section]).glob("*.yaml"))]


def config_names(section: str) -> list[str]:
    """Every name that ``section=NAME`` can take: of a file, or of an extension's entry."""
    entries = registry.added(NAMED[section][0]) if section in NAMED else []
    return sorted({*(file.stem for file in config_files(section)), *entries})


def named_file(section: str, name: str) -> dict[str, Any]:
    """Read the file that ``section=name`` takes; an entry without one has its own defaults.

    Raises:
        UserError: no such name.
    """
    file = next((file for file in config_files(section) if file.stem == name), None)
    if file is not None:
        return _read(file, ())
    if name not in config_names(section):
        raise unknown(f"{section} config", name, config_names(section))
    return {section: {"name": name}}


def _apply(values: dict[str, Any], overrides: list[str], notes: list[str]) -> dict[str, Any]:
    """Lays ``key=value`` arguments over ``values``: ``adapter=lora`` takes a file and replaces the
    section, ``adapter.rank=8`` sets a key.
    """
    keys: dict[str, Any] = {}
    folders = [o.partition("=")[2] for o in overrides if o.startswith("extensions=")]
    use_extensions(folders[-1] if folders else values.get("extensions"))
    for override in overrides:
        section, key, text = _split(override)
        if key is not None:
            keys.setdefault(section, {})[key] = _value(text)
        elif section in TOP:
            keys[section] = text if section == "run_dir" else _value(text)
        else:
            named = named_file(section, text)
            notes += [
                f"{section}={text} also sets {other}.{k}={v}"
                for other in named
                if other != section
                for k, v in named[other].items()
            ]
            keys.pop(section, None)  # no path or rank of another survives
            values = _merge({k: v for k, v in values.items() if k != section}, named)
    for section in NAMED:
        _check_name(section, values.get(section), keys.get(section, {}))
    for key, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        train, below = keys.get("train", {}), values.get("train") or {}
        if train.get(key) is not None and other not in train and below.get(other) is not None:
            notes.append(f"train.{key}={train[key]} replaces train.{other}={below[other]}")
            values = _merge(values, {"train": {other: None}})
    return _merge(values, keys)


def _split(override: str) -> tuple[str, str | None, str]:
    """Parts ``section.key=text``; the key of ``section=text`` is None."""
    name, equals, text = override.partition("=")
    name = renamed_key(name)
    parts = name.split(".")
    if equals and not text:
        raise UserError(
            f"'{override}': nothing stands after the equals sign (an empty variable?); for no"
            f" value write {name}=null, for an empty text {name}='\"\"'"
        )
    if not equals or not all(parts) or len(parts) > 2:
        raise UserError(
            f"'{override}': expected section.key=value, e.g. train.lr=1e-4 or adapter=hoft"
        )
    section = parts[0]
    if section not in (*SECTIONS, *TOP):
        raise UserError(
            f"{name}: no section '{section}'.{nearest(section, SECTIONS)} Allowed:"
            f" {', '.join(SECTIONS)}"
        )
    if len(parts) == 1 and section not in (*FOLDERS, *TOP):
        raise UserError(f"{name}: is a section; set a key of it, e.g. {name}.KEY=VALUE")
    return section, parts[1] if len(parts) == 2 else None, text


def _value(text: str) -> Any:
    """What a user means who types it: YAML, as far as that keeps the text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if not isinstance(value, str | bool | list | None) and str(value) != text:
        return text  # {instruction} is no mapping, revision 0123 no octal number
    return value


def _check_name(section: str, below: Any, keys: dict[str, Any]) -> None:
    """Refuses another ``name`` over a section of a file whose keys it does not have."""
    default, wanted = NAMED[section][2], keys.get("name")
    if not wanted or not isinstance(below, dict) or below.get("name", default) == wanted:
        return
    allowed = field_names(config_class(section, str(wanted)))
    if foreign := sorted(key for key in below if key not in allowed and key not in keys):
        listed = ", ".join(f"{section}.{key}" for key in foreign)
        raise UserError(
            f"{section}.name={wanted}: the config sets {listed} of {below.get('name', default)},"
            f" which {wanted} does not have; {section}={wanted} replaces the whole section"
        )
