"""Records and plain text: every format says the same, and what is no text is refused with its place."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quailora.calibration.text import TextSource
from quailora.errors import CalibrationError

ROWS = [{"id": f"{number}", "text": f'Ünï "{number}", one\nand two'} for number in range(3)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "id,text\n" + "".join('{},"{}"\n'.format(row["id"], row["text"].replace('"', '""')) for row in ROWS)
SAME = {
    "a.jsonl": LINES,
    "a.NDJSON": "\n" + LINES.replace("\n", "\r\n\r\n"),
    "lines.json": LINES,
    "array.json": json.dumps(ROWS, indent=1),
    "inside.json": json.dumps({"version": 1, "data": ROWS}),
    "a.csv": TABLE,
    "a.tsv": TABLE.replace("id,text", "id\ttext").replace(',"', '\t"'),
}


def read(path, fields=(), split="train"):
    return list(TextSource(str(path), fields, split).documents())


def refused(path, *fields):
    with pytest.raises(CalibrationError) as caught:
        read(path, fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", SAME)
def test_every_format_has_the_same_records(name, tmp_path):
    (tmp_path / name).write_text(SAME[name], encoding="utf-8")
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path / name, ("id", "text")) == [f"{number}\n{text}" for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "array.json"])
def test_byte_order_marks(name, encoding, tmp_path):
    (tmp_path / name).write_bytes(SAME[name].encode(encoding))
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize(("ending", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "plain.txt"])
def test_compressed_files(name, ending, module, tmp_path):
    file = tmp_path / (name + ending)
    content = SAME.get(name, TEXTS[0]).encode()
    file.write_bytes(module.compress(content))
    assert read(file) == TEXTS[: 1 if name == "plain.txt" else 3]
    file.write_bytes(module.compress(content * 100)[:-20])
    assert f"Cannot read {file}: Compressed file ended" in refused(file)


def test_tables_of_other_packages(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "a[1].parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([2])).save_to_disk(tmp_path / "splits")
    for name in ("a[1].parquet", "saved", "saved/data-00000-of-00001.arrow", "splits"):
        assert read(tmp_path / name) == TEXTS
    assert read(tmp_path / "splits", split="test") == TEXTS[2:]
    with pytest.raises(CalibrationError, match=r"one of the splits train, test of .*, got 'nowhere'"):
        read(tmp_path / "splits", split="nowhere")
    with pytest.raises(CalibrationError, match="one table and no splits"):
        read(tmp_path / "saved", split="test")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"nonsense")
    assert "Cannot read" in refused(tmp_path / "saved")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.arrow").write_bytes(b"nonsense")
    for name in ("bad.parquet", "bad.arrow"):
        assert f"Cannot read {tmp_path / name}: " in refused(tmp_path / name)


def test_folders(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"text": "other"}', encoding="utf-8")
    (tmp_path / ".hidden.jsonl").write_text("no JSON", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read(".") == TEXTS
    assert read(tmp_path, split="test") == ["other"]
    with pytest.raises(CalibrationError, match=r"one of the splits train, test of .*, got 'nowhere'"):
        read(tmp_path, split="nowhere")
    (tmp_path / "more.txt").write_text("plain", encoding="utf-8")
    assert "files of one kind" in refused(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("b", "a"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} one\n{name} two\n", encoding="utf-8")
    assert read(tmp_path / "texts") == ["a one\na two\n", "b one\nb two\n"]  # whole files, not lines
    (tmp_path / "text[s]").mkdir()
    (tmp_path / "text[s]" / "c.txt").write_text("c", encoding="utf-8")
    assert "takes [, ], * and ?" in refused(tmp_path / "text[s]")
    (tmp_path / "none").mkdir()
    assert "doesn't contain any data files" in refused(tmp_path / "none")


def test_plain_text_has_the_one_field_text(tmp_path):
    file = tmp_path / "notes"
    file.write_text("one\r\n\r\ntwo", encoding="utf-8", newline="")
    assert read(file) == read(file, ("text",)) == ["one\n\ntwo"]
    assert "no field 'prompt'. It has: text" in refused(file, "prompt")
    assert "the shipped text has no field 'prompt'" in refused_source(TextSource(None, ("prompt",)))
    with pytest.raises(CalibrationError, match="A file has no splits, so there is no 'test'"):
        read(file, split="test")


def refused_source(source):
    with pytest.raises(CalibrationError) as caught:
        source.check()
    return str(caught.value)


def test_records_that_are_read_as_plain_text_are_told(tmp_path, caplog):
    file = tmp_path / "records.txt"
    file.write_text(LINES, encoding="utf-8")
    assert read(file) == [LINES]
    assert "looks like records" in caplog.text


def test_null_and_empty_fields_are_nothing(tmp_path):
    file = tmp_path / "a.jsonl"
    records = [{"ask": "Why?", "more": more, "answer": "So."} for more in (None, "", [], "Really?")]
    nothing = {"ask": None, "more": None, "answer": None}
    file.write_text("\n".join(map(json.dumps, [*records, nothing])), encoding="utf-8")
    assert read(file, ("ask", "more", "answer")) == ["Why?\nSo."] * 3 + ["Why?\nReally?\nSo."]


@given(value=st.one_of(st.integers(), st.floats(), st.booleans(), st.lists(st.integers(), min_size=1), st.just({})))
def test_what_is_no_text_is_refused(value, tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "a.jsonl"
    file.write_text(f"{json.dumps({'text': 'fine'})}\n{json.dumps({'text': value})}\n", encoding="utf-8")
    assert f"in the field 'text' of {file}:2, got a" in refused(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"other": "b"}', "a.jsonl:2 has no field 'text'. It has: other"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2, column 10: Expecting value"),
        ("a.jsonl", b'[{"text": "a"}]', "a.jsonl:1 is a list of objects"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "the field 'text' is there twice"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "half of a surrogate pair ('\\ud83d')"),
        ("a.jsonl", b'{"text": ' + b"[" * 99999, "Expected JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "a.jsonl:2 has the byte 0xe9 at position 14 of the line"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "a.jsonl:1 holds a NUL character"),
        ("a.txt", b"one\ncaf\xe9\n", "a.txt:2 has the byte 0xe9 at position 4 of the line"),
        ("a.txt", b"one\n\0", "a.txt:2 holds a NUL character"),
        ("a.txt", b"\xff\xfe\x00", "which is not UTF-16"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "line 2, column 10"),
        ("a.json", b'{"text": ["a", "b"]}', "got a list of strings"),
        ("a.csv", b"id;text\n1;a", "It has: id;text"),
        ("a.csv", b"id,text\n1,a,b", "Expected 2 cells as in the first line; "),
        ("a.csv", b"id,text\n1", "Expected 2 cells as in the first line; "),
        ("a.csv", b"text,text\n1,2", "each field once"),
        ("a.csv", b'text\n"a', "a.csv:1: unexpected end of data"),
        ("a.gz", b"\x1f\x8b\x08 cut off", "Cannot read"),
        ("a.zip", b"PK\x03\x04", "is a zip archive. Unpack it"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    fields = ["text"] if "no field" in message else []
    assert message in refused(tmp_path / name, *fields)


def test_zstandard_asks_for_its_package(tmp_path, monkeypatch):
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"\x28\xb5\x2f\xfd and more")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in refused(file)
    monkeypatch.setitem(sys.modules, "zstandard", SimpleNamespace(open=lambda *_: io.BytesIO(b"unpacked")))
    assert read(file) == ["unpacked"]


def test_cells_of_any_length(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n", encoding="utf-8")
    assert [len(text) for text in read(tmp_path / "a.csv")] == [200_000]


@pytest.mark.parametrize("name", ["nothing.txt", "nothing.CSV.gz", "a/b/c", "./nothing", "~/nothing", "", " "])
def test_missing_files_are_not_looked_for_on_the_hub(name):
    assert f"{name!r} does not exist" in refused(name)


@pytest.mark.parametrize(
    ("source", "message"), [("word " * 999, "name too long"), ("~nobody-here/a.txt", "home directory")]
)
def test_impossible_paths(source, message):
    assert message in refused(source)


def test_hub_names(monkeypatch):
    """A stand-in for the hub, since tests have no network."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return iter([{"text": "from afar"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/name:config", split="test") == ["from afar"]
    assert asked == [(("owner/name", "config"), {"split": "test", "streaming": True})]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    assert "Cannot read split 'train' of the data set 'owner/name' (division by zero)" in refused("owner/name")


def test_check_reads_the_first_document_only(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"text": null}\n{"text": "a"}\nno JSON', encoding="utf-8")
    TextSource(str(file)).check()
    file.write_text('\n{"text": null}\n', encoding="utf-8")
    assert "every record of it is empty, or there is none" in refused_source(TextSource(str(file)))
    os.mkfifo(tmp_path / "pipe")
    assert "Expected a regular file" in refused_source(TextSource(str(tmp_path / "pipe")))
