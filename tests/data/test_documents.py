"""Documents come from where the spec says, whole and in order, and what cannot be read is named."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from open_mythos.data.documents import file_signature, open_documents, resolve_spec


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[str]:
    return list(open_documents(str(path)))


def test_a_file_is_one_document_as_it_stands(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo \U0001f600\n\n"
    assert read(write(tmp_path / "any.suffix", text)) == [text]


def test_json_lines_are_one_document_each(tmp_path: Path) -> None:
    rows = [{"text": "a\nb"}, {"id": 3, "text": ""}, {"text": "é\u2028x"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=index == 0) for index, row in enumerate(rows))
    assert read(write(tmp_path / "x.jsonl", lines)) == ["a\nb", "é\u2028x"]


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(arrow.table(columns), path)
    return path


def test_parquet_rows_are_one_document_each(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"id": [1, 2, 3], "text": ["a", "", "é"]})
    assert read(path) == ["a", "é"]


def test_a_folder_is_read_by_suffix_and_sorted_by_path(tmp_path: Path) -> None:
    for name, text in [
        ("b.txt", "b"),
        ("a/z.py", "z"),
        ("a/y.JSONL", '{"text": "y1"}\n{"text": "y2"}'),
        ("c/empty.txt", ""),
        ("c/d.md", "d"),
        ("picture.png", b"\xff\xd8"),
        (".git/config.txt", "hidden"),
        (".hidden.txt", "hidden"),
    ]:
        write(tmp_path / name, text)
    assert read(tmp_path) == ["y1", "y2", "z", "b", "d"]


def test_documents_can_be_read_again(tmp_path: Path) -> None:
    documents = open_documents(str(write(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": "b"}\n')))
    assert list(documents) == list(documents) == ["a", "b"]


def test_the_standard_library_has_modules_but_no_tests_and_no_packages() -> None:
    documents = open_documents("stdlib")
    names = {path.as_posix() for path in documents.files}
    assert {path.suffix for path in documents.files} == {".py"}
    assert any(name.endswith("/asyncio/base_events.py") for name in names)
    assert not any("/site-packages/" in name or "/test/" in name for name in names)
    assert list(documents.files) == sorted(documents.files)
    assert next(iter(documents)).strip()


def test_a_path_means_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.txt", "x")
    monkeypatch.chdir(tmp_path)
    assert resolve_spec("x.txt") == str((tmp_path / "x.txt").resolve())
    assert list(open_documents("x.txt")) == ["x"]


def test_the_signature_tells_a_change(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "x")
    before = file_signature([path])
    assert file_signature([path]) == before
    write(path, "xx")
    assert file_signature([path]) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"x\.txt', which is empty; it must hold at least one character"),
        ("x.jsonl", b"\n \n", r"x\.jsonl', which is empty"),
        ("x.txt", b"good \xff bad", r"x\.txt has byte 0xff at offset 5; it must be UTF-8 text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"x\.jsonl, line 2 has byte 0xe9 at offset 24; it must be"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', r"x\.jsonl, line 3 is not JSON: Expecting value"),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', r"x\.jsonl, line 1 has no 'text'; it has \['body', 'id'\]"),
        ("x.jsonl", b'["a"]\n', r"x\.jsonl, line 1 is a JSON list; it must be an object with 'text'"),
        ("x.jsonl", b'{"text": 7}\n', r"x\.jsonl, line 1 has 7 as 'text'; it must be a string"),
        ("x.jsonl", b'{"text": "a\\ud800"}\n', r"x\.jsonl, line 1 has '\\ud800' at character 1; it must be text that"),
        ("x.parquet", b"PAR0", r"x\.parquet cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "body": ["a"]}, r"x\.parquet has no column 'text'; it has \['id', 'body'\]"),
        ({"text": ["a", None]}, r"x\.parquet, row 2 has None as 'text'; it must be a string"),
    ],
)
def test_parquet_without_text_is_named(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"text": [f"{index} " * 50 for index in range(1000)]})
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.parquet is damaged after row 0"):
        read(path)


def test_one_bad_file_of_a_folder_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.txt", b"\xfe")
    with pytest.raises(ValueError, match=r"b\.txt has byte 0xfe at offset 0"):
        read(tmp_path)


def test_paths_that_are_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data is '.*/gone', which does not exist; it must be 'stdlib'"):
        open_documents(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="data is ''; it must be 'stdlib'"):
        open_documents("")
    with pytest.raises(ValueError, match="which is neither file nor folder"):
        open_documents("/dev/null")
    write(tmp_path / "x.png", "x")
    with pytest.raises(ValueError, match=r"a folder without any file ending in .*\.txt"):
        open_documents(str(tmp_path))


def refuse(*_: object, **__: object) -> Any:
    raise PermissionError(13, "Permission denied", "some file")


@pytest.mark.parametrize(("name", "method"), [("x.txt", "read_bytes"), ("x.jsonl", "open")])
def test_a_file_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """The refusal is simulated: nothing is refused to root, as whom tests may run."""
    path = write(tmp_path / name, "x")
    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(ValueError, match=rf"{path} cannot be read: Permission denied"):
        read(path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.txt", "x")
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match="cannot be listed: Permission denied"):
        read(tmp_path)


def without(module: str) -> Callable[..., Any]:
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {module!r}")
        return real(name, *args, **kwargs)

    return importing


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", "")
    monkeypatch.setattr(builtins, "__import__", without("pyarrow"))
    with pytest.raises(ImportError, match=r"x\.parquet needs pyarrow: pip install 'open-mythos\[train\]'"):
        read(path)
