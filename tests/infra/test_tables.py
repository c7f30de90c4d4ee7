"""Tables as pandas, Excel, LibreOffice, R, Google Sheets and Common Voice write them."""

from __future__ import annotations

import builtins
import codecs
import zipfile

import pandas as pd
import pytest

from pipelines.infra.errors import LabError
from pipelines.infra.tables import is_missing, open_table
from pipelines.infra.tables.formulas import decode_cell, encode_cell

FRAME = pd.DataFrame(
    {
        "path": ["c/1.wav", "c/2.wav", "c/3.wav"],
        "text": ['"Hej", sa hon.', "rad ett\nrad två", 'Han ropade "nu";\toch, sprang'],
        "speaker": ["anna", None, "3"],
    }
)
TEXTS = FRAME["text"].tolist()


@pytest.fixture
def read(tmp_path):
    """`read(name, content)`: the rows of a table with this content, as dictionaries."""

    def make(name: str, content: str | bytes) -> list[dict]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [cells for _, cells in open_table(path).rows()]

    return make


FORMULAS = ["=1+1", "+46 70 12", "-5 grader", "@a", "'=1", "''+1", "＝1", "a;=1+1", "a; -x", "\t=1", "\r=1", "=", "--"]


@pytest.mark.parametrize("cell", [*FORMULAS, "'hej", "", "-5", "+4,5", "-1e-05", "1-2", "a=b", "nej - ja"])
def test_encoded_cell_is_no_formula_and_is_decoded(cell):
    stored = encode_cell(cell)
    parts = [stored, *(part.lstrip() for part in stored.split(";")[1:])]
    assert stored in ("-5", "+4,5", "-1e-05") or not any(part.startswith(tuple("=+-@\t\r＝")) for part in parts)
    assert decode_cell(stored) == cell
    assert (stored == cell) == (cell not in FORMULAS)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_table_reads_encoded_cells_as_they_were(read, name):
    separator = "," if name == "t.csv" else "\t"
    lines = [[encode_cell(cell), encode_cell(cell)] for cell in ("=id", *FORMULAS) if not {*"\t\r"} & {*cell}]
    rows = read(name, "".join(f"{separator.join(cells)}\n" for cells in [["'=path", "text"], *lines[1:]]))
    assert [row["=path"] for row in rows] == [row["text"] for row in rows]
    assert [row["text"] for row in rows] == [cell for cell in FORMULAS if not {*"\t\r"} & {*cell}]


def excel(frame: pd.DataFrame, delimiter: str = ";", encoding: str = "utf-8", first: str = "") -> bytes:
    """Return a table as Excel saves it: CRLF between rows, quotes where they are needed."""
    return (first + frame.to_csv(sep=delimiter, index=False, lineterminator="\r\n")).encode(encoding)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pandas.csv", FRAME.to_csv(index=False)),
        ("pandas.tsv", FRAME.to_csv(sep="\t", index=False)),
        ("pandas_index.csv", FRAME.to_csv()),
        ("pandas.jsonl", FRAME.to_json(orient="records", lines=True, force_ascii=False)),
        ("pandas.json", FRAME.to_json(orient="records")),
        ("excel.csv", codecs.BOM_UTF8 + excel(FRAME)),
        ("excel_sep.csv", codecs.BOM_UTF8 + excel(FRAME, first="sep=;\r\n")),
        ("excel_sep_comma.csv", excel(FRAME, ",", first='"sep=,"\r\n')),
        ("excel_ansi.csv", excel(FRAME, encoding="cp1252")),
        ("excel_unicode_text.tsv", excel(FRAME, "\t", "utf-16")),
        ("excel_unicode_text.csv", excel(FRAME, "\t", "utf-16")),
        ("utf_16_without_mark.csv", excel(FRAME, encoding="utf-16-le")),
        ("libreoffice.csv", FRAME.to_csv(index=False, quoting=1)),
        ("libreoffice.tsv", FRAME.to_csv(sep="\t", index=False, quoting=1)),
        ("r_write_csv.csv", '"","path","text","speaker"\n' + FRAME.to_csv(quoting=2, header=False, na_rep="NA")),
        ("r_write_table.tsv", '"path"\t"text"\t"speaker"\n' + FRAME.to_csv(sep="\t", quoting=2, header=False)),
        ("pipes.csv", FRAME.to_csv(sep="|", index=False)),
        ("empty_columns.csv", "path,text,speaker,,\n" + FRAME.to_csv(header=False, index=False).replace("\n", ",,\n")),
    ],
)
def test_writers_of_quoted_tables_are_read(read, name, content):
    if name == "empty_columns.csv":
        content = content.replace("rad ett,,", "rad ett")
    rows = read(name, content)
    assert [row["text"] for row in rows] == TEXTS
    assert [row["path"] for row in rows] == FRAME["path"].tolist()
    assert [is_missing(row["speaker"]) for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    "texts",
    [
        ['"Hej, sa han', 'ja"', "nej"],
        ['5" bred', "hej", '"Hej" sa "du"'],
        ['"Hej du."', "hej, du", "ja"],
    ],
    ids=["lone quotes", "inches", "whole sentence"],
)
def test_common_voice_tsv_keeps_quotes(read, texts):
    table = "path\tsentence\n" + "".join(f"{number}.mp3\t{text}\n" for number, text in enumerate(texts))
    assert [row["sentence"] for row in read("train.tsv", table)] == texts


def test_cell_quoted_before_common_voice_is_unquoted(read):
    table = 'path\tsentence\n1.mp3\t"""Hej"", sa hon."\n2.mp3\t"Hej, sa han\n'
    assert [row["sentence"] for row in read("train.tsv", table)] == ['"Hej", sa hon.', '"Hej, sa han']


def test_google_sheets_tsv_is_unquoted(read):
    assert read("a.tsv", 'path\ttext\r\n1.wav\t"Hej", sa hon')[0]["text"] == '"Hej", sa hon'


def test_json_nan_and_null_are_missing(read):
    rows = read("a.jsonl", '{"text": NaN, "speaker": null, "n": -Infinity}\n{"text": "Nan", "speaker": 3.0}\n')
    assert rows == [{"text": None, "speaker": None, "n": None}, {"text": "Nan", "speaker": 3.0}]


MISSING = ["", " ", "NA", "nan", "NaN", "None", "null", "NULL", "<NA>", "#N/A", None, float("nan")]


@pytest.mark.parametrize("word", MISSING)
def test_words_for_a_missing_value_are_missing(word):
    assert is_missing(word)


@pytest.mark.parametrize("word", ["Na", "Nan", "nana", "noll", "0", 0, "-"])
def test_other_words_are_values(word):
    assert not is_missing(word)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "path,text,Text \n1.wav,a,b\n", ["'text' as column 2", "'Text' as column 3"]),
        ("a.jsonl", '{"path": "1.wav", "text": "a", "text": "b"}', ["line 1", "'text' as column 2", "column 3"]),
        ("a.csv", "path,text\n1.wav,hej, du\n2.wav,a, b\n", ["line 2", "header's 2 cells", "got 3", "quotes"]),
        ("a.csv", "path,text\n1,hej, du\n1,a, b\n", ["line 2", "got 3"]),
        ("a.tsv", 'path\ttext\n1.wav\t"Hej\n2.wav\ta\tb\n', ["line 3", "got 3"]),
        ("a.tsv", "path\ttext\n1.wav\n", ["line 2", "got 1"]),
        ("a.csv", "", ["is empty"]),
        ("a.csv", 'path,text\n1.wav,"hej\n', ["quotes must be balanced"]),
        ("a.csv", "path,text\n1.wav,på väg\n".encode("mac-roman"), ["UTF-8", "0x8c"]),
        ("a.csv", "path,text\n1.wav,på väg\n".encode("cp850"), ["UTF-8", "0x86"]),
        ("a.csv", "path,text\n1.wav,привет мир\n".encode("cp1251"), ["UTF-8"]),
        ("a.csv", "path,text\n1.wav,źdźbło trawy\n".encode("cp1250"), ["UTF-8"]),
        ("a.jsonl", "[1, 2]", ["line 1", "JSON object"]),
        ("a.json", "{", ["line 1", "JSON object"]),
        ("a.ods", b"PK", ["table a.ods must be", ".xlsx"]),
    ],
)
def test_unusable_table_is_one_line(read, name, content, words):
    with pytest.raises(LabError) as error:
        read(name, content)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_workbook_is_read(tmp_path):
    pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    FRAME.assign(n=[3.0, 1.5, None]).to_excel(tmp_path / "a.xlsx", index=False)
    rows = [cells for _, cells in open_table(tmp_path / "a.xlsx").rows()]
    assert [row["text"] for row in rows] == TEXTS
    assert [row["n"] for row in rows] == [3, 1.5, None]
    with pd.ExcelWriter(tmp_path / "b.xlsx") as writer:
        for sheet in ("one", "two"):
            FRAME.to_excel(writer, sheet_name=sheet)
    (tmp_path / "c.xlsx").write_bytes(b"PK\3\4 damaged")
    for name, words in (("b.xlsx", "one and two"), ("c.xlsx", "cannot be read as .xlsx")):
        with pytest.raises(LabError, match=words):
            list(open_table(tmp_path / name).rows())


def test_workbook_without_openpyxl_names_the_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "openpyxl":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LabError, match="pip install 'openpyxl"):
        open_table(tmp_path / "a.xlsx").columns  # noqa: B018  reads the file


def test_workbook_that_unpacks_to_far_more_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.xlsx", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("xl/worksheets/sheet1.xml", b"a" * 51_000_000)
    with pytest.raises(LabError, match=r"^bomb.xlsx has 0.0 MB and unpacks to 51 MB, which no table does: save it"):
        next(open_table(tmp_path / "bomb.xlsx").rows())
