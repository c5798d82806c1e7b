"""Reading the structs of a source: parameters of kernels, and configs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from epjit.errors import CompileError
from epjit.runtime import sources
from epjit.runtime.params import field_types, params_type, setter_of
from tests.cpu.runtime.toy_kernel import replace_in, write_tree


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_tree(tmp_path / "sources")
    monkeypatch.setattr(sources, "ROOT", root)
    return root


def test_params_type_has_the_layout_of_the_struct() -> None:
    record = params_type("toy/scale.cu", "ScaleParams")
    fields = {name: c_type for name, c_type, *_ in record._fields_}
    assert fields == {
        "x": ctypes.c_uint64,
        "peers": ctypes.c_uint64 * 4,
        "num": ctypes.c_int32,
        "factor": ctypes.c_float,
        "wide": ctypes.c_bool,
        "stamp": ctypes.c_int64,
    }
    assert ctypes.sizeof(record) == 64
    with pytest.raises(AttributeError):
        record().typo = 1


@pytest.mark.parametrize("names", [("num", "wide"), ("stamp", "x"), ("x",)])
def test_a_setter_touches_nothing_else(names: tuple[str, ...]) -> None:
    """Fields between two of its own stay as they are."""
    record = params_type("toy/scale.cu", "ScaleParams")()
    ctypes.memset(ctypes.addressof(record), 0xFF, ctypes.sizeof(record))
    expected = type(record).from_buffer_copy(record)
    for name in names:
        setattr(expected, name, 1)
    setter_of(record, names, "scale")(**dict.fromkeys(names, 1))
    assert bytes(record) == bytes(expected)


@pytest.mark.parametrize(
    ("field", "c_type"),
    [
        ("const void* a", ctypes.c_uint64),
        ("char* const* a", ctypes.c_uint64),
        ("const int64_t *a", ctypes.c_uint64),
        ("const char* a[3]", ctypes.c_uint64 * 3),
        ("uint32_t a[kMaxPeers]", ctypes.c_uint32 * 4),
        ("double a", ctypes.c_double),
    ],
)
def test_params_fields(tree: Path, field: str, c_type: type) -> None:
    replace_in(tree / "toy" / "scale.cu", "float factor;", f"{field};  // text; and more")
    fields = params_type("toy/scale.cu", "ScaleParams")._fields_
    assert ("a", c_type) in fields


def test_bases_come_first_and_structs_nest(tree: Path) -> None:
    structs = "struct Base { int64_t a; bool b; };\nstruct Pair { int32_t c; float d; };\n"
    replace_in(
        tree / "toy" / "scale.cu", "struct ScaleParams {", structs + "struct ScaleParams : Base {"
    )
    replace_in(tree / "toy" / "scale.cu", "float factor;", "Pair pairs[3];")
    record = params_type("toy/scale.cu", "ScaleParams")
    assert list(field_types(record)) == [
        "a",
        "b",
        "x",
        "peers",
        "num",
        "pairs",
        "wide",
        "stamp",
    ]
    assert (record.a.offset, record.b.offset, record.x.offset) == (0, 8, 16)
    params = record(b=True)
    params.pairs[2].d = 0.5
    assert (params.b, params.pairs[2].d) == (True, 0.5)


@pytest.mark.parametrize(
    "field",
    [
        "Vec16 a",
        "int32_t a, b",
        "int32_t a = 3",
        "unsigned int a",
        "int32_t a[2][2]",
        "a",
        "int f()",
    ],
)
def test_unreadable_field_is_named(tree: Path, field: str) -> None:
    replace_in(tree / "toy" / "scale.cu", "float factor;", f"{field};")
    with pytest.raises(CompileError) as caught:
        params_type("toy/scale.cu", "ScaleParams")
    assert f"struct ScaleParams: cannot read the field `{field};`" in str(caught.value)


def test_unknown_array_length_and_missing_struct(tree: Path) -> None:
    with pytest.raises(CompileError, match="has no `struct OtherParams"):
        params_type("toy/scale.cu", "OtherParams")
    replace_in(tree / "toy" / "scale.cu", "kMaxPeers", "kOther")
    with pytest.raises(CompileError, match="no `constexpr int kOther = <number>;`"):
        params_type("toy/scale.cu", "ScaleParams")


def test_sources_of_the_package_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another root are read anew: they may have changed."""
    assert params_type("toy/scale.cu", "ScaleParams") is not params_type(
        "toy/scale.cu", "ScaleParams"
    )
    monkeypatch.setattr(sources, "ROOT", None)
    source = "intranode/notify.cu"
    record, text = params_type(source, "NotifyParams"), sources.read("epjit/sync.cuh")
    monkeypatch.setattr(sources, "root", lambda: pytest.fail("a source is read again"))
    assert params_type(source, "NotifyParams") is record
    assert sources.closure(source)["epjit/sync.cuh"] is text
