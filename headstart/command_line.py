"""Parse command-line arguments into dataclasses of settings: the same way for every command."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from headstart.errors import UsageError

Settings = TypeVar("Settings")


def parse_settings(
    kind: type[Settings], arguments: Sequence[str], prog: str, default: Settings | None = None
) -> Settings:
    """Parse `arguments` into the dataclass `kind`: its fields are the options, their docstrings are the help.

    An optional group of settings is there or not according to `default`, which holds the values of settings that are
    not on the command line: a flag of one of its fields changes it, and no flag is a subcommand. A list option that is
    named several times keeps all values.

    Raises SystemExit with status 0 after --help and 2 for an unknown option or a value of another type, and UsageError
    for a value that `kind` refuses.
    """
    import tyro

    return tyro.cli(
        kind,
        args=add_repeated(kind, arguments),
        default=tyro.MISSING_NONPROP if default is None else default,
        prog=prog,
        config=(tyro.conf.AvoidSubcommands,),
        registry=yaml_numbers(),
    )


def add_repeated(target: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with all values of a list option after its first mention.

    `--stop a --stop b` means `--stop a b`; tyro alone would silently keep the last mention. For an option with one
    value the last mention counts, as usual. `target` is the function or dataclass that `tyro.cli` parses for.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    named = Counter(_option(argument) for argument in arguments[:end])
    repeated = {option for option in _list_options(target) if named[option] > 1}
    found: list[str] = []
    values: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    current: str | None = None
    for argument in arguments[:end]:
        option = _option(argument)
        if option is not None:
            current = option if option in repeated else None
        if current is None:
            found.append(argument)
        elif option is None:
            values[current].append(argument)
        else:
            name, equals, value = argument.partition("=")
            if option not in places:
                found.append(name)
                places[option], values[option] = len(found), []
            if value.startswith("-"):
                raise UsageError(f"{argument}: if a value begins with a dash, name {name} once, with all its values")
            values[option] += [value] if equals else []
    for option, at in reversed(places.items()):
        found[at:at] = values[option]
    return [*found, *arguments[end:]]


def number_of(text: str) -> float:
    """Return the number that `text` is to Python (inf) or to YAML (.inf, -.Inf, .nan), as in a file of settings."""
    name = text.strip().lower()
    return float(name.replace(".", "", 1) if name.lstrip("+-") in (".inf", ".nan") else text)


def yaml_numbers() -> Any:
    """Return a registry for `tyro.cli` by which `number_of` reads every float."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
        if kind.type is not float:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda words: number_of(words[0]),
            is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _option(argument: str) -> str | None:
    """Return the name of the option that an argument is, if it is one."""
    return argument[2:].partition("=")[0].replace("_", "-") if argument.startswith("--") else None


def _list_options(target: Any, prefix: str = "", bare: bool = False) -> set[str]:
    """Return the names of options with any number of values, without leading dashes.

    They start with `prefix`, the names of the groups that hold them; `bare` leaves out the names of all groups inside.
    """
    from tyro.conf import OmitArgPrefixes

    found = set()
    for name, hint in get_type_hints(target, include_extras=True).items():
        option = prefix + name.replace("_", "-")
        marks = getattr(hint, "__metadata__", ())
        within = bare or OmitArgPrefixes in marks
        unnamed = within or any(getattr(mark, "name", None) == "" for mark in marks)
        for part in _parts(hint):
            if get_origin(part) is list or (get_origin(part) is tuple and get_args(part)[-1:] == (...,)):
                found.add(option)
            elif is_dataclass(part) and name != "return":
                found |= _list_options(part, prefix if unnamed else option + ".", within)
    return found


def _parts(hint: Any) -> list[Any]:
    """Return the alternatives of a union, and what annotations are about."""
    if get_origin(hint) is Annotated:
        return _parts(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [part for alternative in get_args(hint) for part in _parts(alternative)]
    return [hint]
