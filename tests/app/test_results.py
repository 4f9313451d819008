from pathlib import Path

import pytest

from app.cli.results import Rule, Table, cell, row_of

RULE = Rule("1", "", "", "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "＝", "'"])
def test_no_cell_starts_as_a_formula(start: str) -> None:
    assert cell(f"{start}cmd|' /C calc'!A0") == f"'{start}cmd|' /C calc'!A0"
    assert cell([f"{start}1", "b"]).startswith("'")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "true"), (0.5, "0.5"), (-3, "-3"), (["a", "b"], "a; b"), ("a\nb\rc", "a\\nb\\rc")],
)
def test_a_value_is_one_line_of_text(value: object, text: str) -> None:
    assert cell(value) == text


def test_a_name_that_is_no_text_is_found_again(tmp_path: Path) -> None:
    image = tmp_path / '=\udcff\n,".jpg'
    image.write_bytes(b"x")
    with Table(tmp_path / "out.csv", ["a"]) as table:
        table.add(row_of(image, ValueError("bad")) | {"error": None, "version": "1"})
    (tmp_path / "out.csv").read_text(encoding="utf-8")
    with Table(tmp_path / "out.csv", ["a"]) as table:
        assert table.done(image, RULE, overlay=None)
        assert not table.done(image, Rule("2", "", "", ""), overlay=None)


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with Table(out, ["a"]), pytest.raises(ValueError, match="another run is writing to it"):
        Table(out, ["a"])
    with Table(out, ["a"]):
        pass


def test_a_file_that_was_torn_in_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("file,size_by")
    with Table(out, ["a", "b"]):
        pass
    assert out.read_text().startswith("file,size_bytes,modified,error,")
    with pytest.raises(ValueError, match="has other columns"):
        Table(out, ["a", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_file_that_is_changed_after_it_was_handed_out_is_judged_again(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"x")
    with Table(tmp_path / "out.csv", ["a"]) as table:
        assert not table.done(image, RULE, overlay=None)
        image.write_bytes(b"another")
        table.add(row_of(image, ValueError("bad")) | {"error": None, "version": "1"})
    with Table(tmp_path / "out.csv", ["a"]) as table:
        assert not table.done(image, RULE, overlay=None)
