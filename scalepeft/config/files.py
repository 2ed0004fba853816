"""YAML files and ``dotted.key=value`` arguments to nested values."""

from pathlib import Path
from typing import Any

import yaml

from scalepeft.config.schema import (
    NAMED,
    PATHS,
    SECTIONS,
    RunConfig,
    config_class,
    from_dict,
    use_extensions,
)
from scalepeft.core import registry
from scalepeft.core.errors import UserError, nearest, unknown
from scalepeft.core.fields import _field_names


def _config_first(settings: list[str]) -> tuple[str | None, list[str]]:
    """Parts ``[CONFIG] KEY=VALUE ...``."""
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
    values = _read(Path(path), ()) if path else {}
    _apply(values, overrides, notes)
    return values


def overlay(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    """Lays ``key=value`` arguments over a resolved config."""
    _apply(values, overrides, [])
    return from_dict(values)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for i, key in enumerate(keys):
            if key.value in [k.value for k in keys[:i]]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' stands there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file() and not path.suffix:
        path = path.with_suffix(".yaml")
    if not path.is_file():
        raise UserError(
            f"no config file {path} (from {Path.cwd()}); the shipped ones are in"
            f" {config_root()}/runs"
        )
    if path.resolve() in above:
        raise UserError(f"{path} includes itself by way of {', '.join(p.name for p in above)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a config is a mapping with {', '.join(SECTIONS)}, not {type(values).__name__}"
        )
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
        _merge(merged, _read(found, (*above, path.resolve())))
    for section, value in values.items():  # first: what this file itself sets is over what it names
        if section in FOLDERS and isinstance(value, str):
            merged.pop(section, None)  # whole, as on the command line
            _merge(merged, named_file(section, value))
    for section, value in values.items():
        if section in FOLDERS and isinstance(value, str):
            continue
        if section in SECTIONS and section not in PATHS and not isinstance(value, dict | None):
            raise UserError(f"{path}: {section}: expected keys under it, not {value!r}")
        _merge(merged, {section: value})
    return merged


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif value is not None or key not in into or not isinstance(into[key], dict):
            into[key] = value


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


def _apply(values: dict[str, Any], overrides: list[str], notes: list[str]) -> None:
    """Lays ``key=value`` arguments over ``values``: ``adapter=lora`` takes a file,
    ``adapter.rank=8`` sets a key.
    """
    given: dict[str, Any] = {}
    folders = [o.partition("=")[2] for o in overrides if o.startswith("extensions=")]
    use_extensions(folders[-1] if folders else values.get("extensions"))
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if equals and not text:
            raise UserError(
                f"'{override}': nothing stands after the equals sign (an empty variable?); for no"
                f" value write {key}=null, for an empty text {key}='\"\"'"
            )
        if not equals or not all(parts) or len(parts) > 2:
            raise UserError(
                f"'{override}': expected section.key=value, e.g. train.lr=1e-4 or adapter=hoft"
            )
        if parts[0] not in (*SECTIONS, *PATHS):
            raise UserError(
                f"{key}: no section '{parts[0]}'.{nearest(parts[0], SECTIONS)} Allowed:"
                f" {', '.join(SECTIONS)}"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if not isinstance(value, str | bool | list | None) and str(value) != text:
            value = text  # {instruction} is no mapping, revision 0123 no octal number
        if len(parts) == 1 and key in FOLDERS:
            # A section chosen by name replaces the file's whole section: no path or rank of another
            # survives.
            values.pop(key, None)
            given.pop(key, None)
            named = named_file(key, text)
            notes += [
                f"{key}={text} also sets {other}.{k}={v}"
                for other in named
                if other != key
                for k, v in named[other].items()
            ]
            _merge(values, named)
        elif len(parts) == 1:
            if key not in PATHS:
                raise UserError(f"{key}: is a section; set a key of it, e.g. {key}.KEY=VALUE")
            given[key] = text if key == "run_dir" else value
        else:
            given.setdefault(parts[0], {})[parts[1]] = value
    for section, (_, _, default, _) in NAMED.items():
        wanted = given.get(section, {}).get("name")
        held = values.get(section)
        if wanted and isinstance(held, dict) and held.get("name", default) != wanted:
            allowed = _field_names(config_class(section, str(wanted)))
            dropped = sorted(k for k in held if k not in allowed)
            if dropped:
                keys = ", ".join(f"{section}.{k}" for k in dropped)
                notes.append(
                    f"{section}.name={wanted} replaces {held.get('name', default)}: {keys} of the"
                    " file do not apply"
                )
            values[section] = {k: v for k, v in held.items() if k in allowed}
    for key, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        set_now, held = given.get("train", {}), values.get("train") or {}
        if set_now.get(key) is not None and other not in set_now and held.get(other) is not None:
            notes.append(f"train.{key}={set_now[key]} replaces train.{other}={held[other]}")
            values["train"] = {**held, other: None}
    _merge(values, given)
