"""Parameters of a kernel: the C struct in its source, as a record that Python fills."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from epjit.errors import CompileError
from epjit.runtime import sources

_C_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int32,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_FORMATS: dict[Any, Any] = {
    ctypes.c_bool: "?",
    ctypes.c_int32: "i",
    ctypes.c_uint32: "I",
    ctypes.c_int64: "q",
    ctypes.c_uint64: "Q",
    ctypes.c_float: "f",
    ctypes.c_double: "d",
}  # of a memoryview, and of struct
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FIELD = re.compile(
    r"(?:const\s+)?(?P<type>\w+)(?P<pointer>(?:\s*(?:const\s*)?\*)+(?:\s*const\b)?)?\s*\b(?P<name>[A-Za-z_]\w*)"
    r"(?:\s*\[\s*(?P<count>\w+)\s*\])?"
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@sources.remembered
def params_type(source: str, struct_name: str) -> type[ctypes.Structure]:
    """Reads a struct of parameters, or of a config, from a source.

    Args:
        source: File below `cuda_src`; the struct may stand in what it includes.
        struct_name: Name of the struct. Its fields are numbers, pointers, structs, and arrays of
            these whose length is a number or a ``constexpr int``. It may have bases, whose fields
            come first and are fields of the record, too.

    Returns:
        The record with the same layout. Pointers are integers in it.

    Raises:
        CompileError: The struct is missing, or has a field that cannot be read.
    """
    return _read_struct(_code(source), struct_name, source)


@sources.remembered
def _code(source: str) -> str:
    """A source and all that it includes, without comments."""
    return _COMMENT.sub("", "\n".join(sources.closure(source).values()))


def _read_struct(text: str, name: str, source: str) -> type[ctypes.Structure]:
    found = _struct(text, name)
    if found is None:
        raise CompileError(f"{source} has no `struct {name} {{...}};`")
    bases = _IDENTIFIER.findall(found["bases"] or "")
    fields: list[tuple[str, Any]] = [(base, _read_struct(text, base, source)) for base in bases]
    for line in (" ".join(part.split()) for part in found["fields"].split(";")):
        if not line:
            continue
        field = _FIELD.fullmatch(line)
        c_type: Any = None if field is None else _C_TYPES.get(field["type"])
        if field is not None and field["pointer"]:
            c_type = ctypes.c_uint64
        elif field is not None and c_type is None and _struct(text, field["type"]):
            c_type = _read_struct(text, field["type"], source)
        if field is None or c_type is None:
            raise CompileError(f"{source}: struct {name}: cannot read the field `{line};`")
        if field["count"] is None:
            fields.append((field["name"], c_type))
        else:
            length = _array_length(field["count"], text, f"{source}: struct {name}: `{line};`")
            fields.append((field["name"], c_type * length))
    # Without __slots__, a misspelt field would become a new attribute and be lost.
    members = {"_anonymous_": bases, "_fields_": fields, "__slots__": ()}
    return type(name, (ctypes.Structure,), members)


def _struct(text: str, name: str) -> re.Match[str] | None:
    pattern = rf"\bstruct\s+{re.escape(name)}\s*(?::(?P<bases>[^{{]*))?\{{(?P<fields>.*?)\}}\s*;"
    return re.search(pattern, text, re.DOTALL)


def field_types(record: type[ctypes.Structure]) -> dict[str, Any]:
    """Fields of a record by name, those of its bases among them."""
    fields: Sequence[Any] = record._fields_
    types: dict[str, Any] = {}
    for name, c_type in fields:
        if name in getattr(record, "_anonymous_", ()):
            types |= field_types(c_type)
        else:
            types[name] = c_type
    return types


def _array_length(count: str, text: str, where: str) -> int:
    if count.isdigit():
        return int(count)
    found = re.search(rf"\bconstexpr\s+\w+\s+{count}\s*=\s*(\d+)\s*;", text)
    if found is None:
        raise CompileError(f"{where}: there is no `constexpr int {count} = <number>;`")
    return int(found[1])


class _ArrayField:
    """Stores a whole array; `fields_of` has one for each array of a record."""

    def __init__(self, array: ctypes.Array[Any]) -> None:
        self._array = array

    def __setitem__(self, index: int, values: Sequence[Any]) -> None:
        self._array[:] = list(values)


def fields_of(record: ctypes.Structure) -> dict[str, Any]:
    """Fields of a record, to be set by ``fields[name][0] = value``.

    Half the time of setting attributes, and unlike these it refuses a number that does not fit.
    """
    data = memoryview(record).cast("B")
    fields: dict[str, Any] = {}
    for name, c_type in field_types(type(record)).items():
        if issubclass(c_type, ctypes.Array):
            fields[name] = _ArrayField(getattr(record, name))
        else:
            offset, size = getattr(type(record), name).offset, ctypes.sizeof(c_type)
            fields[name] = data[offset : offset + size].cast(_FORMATS[c_type])
    return fields


def setter_of(record: ctypes.Structure, names: Iterable[str], op: str) -> Callable[..., None]:
    """A function that sets these fields of a record by keyword, always all of them.

    Written for the names, as dataclasses write theirs: neighbours go into memory together, by one
    `struct.pack_into`, which takes a quarter of the time of a dict and a store a field.

    Args:
        record: The record.
        names: Numbers and pointers, no arrays.
        op: For messages.
    """
    kind = type(record)
    types, at = field_types(kind), {name: getattr(kind, name).offset for name in names}
    runs: list[list[str]] = []
    end = -1
    for name in sorted(at, key=at.__getitem__):
        if at[name] != end:
            runs.append([])
        runs[-1].append(name)
        end = at[name] + ctypes.sizeof(types[name])
    fields = fields_of(record)

    def explain(values: dict[str, Any]) -> None:
        for name, value in values.items():
            try:
                fields[name][0] = value
            except (TypeError, ValueError) as error:
                raise type(error)(f"{op}: {name}={value!r}: {error}") from None

    known: dict[str, Any] = {
        "_data": memoryview(record).cast("B"),
        "_error": struct.error,
        "_explain": explain,
    }
    lines = [f"def {op}(*, {', '.join(at)}):", " try:"]
    for i, run in enumerate(runs):
        form = "=" + "".join(_FORMATS[types[name]] for name in run)
        known[f"_pack{i}"] = struct.Struct(form).pack_into
        lines.append(f"  _pack{i}(_data, {at[run[0]]}, {', '.join(run)})")
    lines += [" except _error:", "  _explain(locals())", "  raise"]
    exec("\n".join(lines), known)
    made: Callable[..., None] = known[op]
    return made
