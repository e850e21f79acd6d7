"""Tables with one row per example, and the curve over timesteps."""

import math
import sys

import pytest
from PIL import Image

from perrin.errors import ArgumentError
from perrin.evaluation.tables import claim_table, write_table
from perrin.evaluation.term_curve import Term, columns_of, is_plot, plot_terms

COLUMNS = {
    "index": [3, 5],
    "name": ["a,b", 'c "d"'],
    "bpd": [1.25, math.nan],
    "log-SNR 6 to 8": [-0.0, 1 / 3],
}
LEADING = ("index", "name")


def test_a_csv_has_a_header_and_nothing_for_what_is_not_known(tmp_path):
    write_table(tmp_path / "x" / "t.csv", COLUMNS)
    assert (tmp_path / "x" / "t.csv").read_text().splitlines() == [
        "index,name,bpd,log-SNR 6 to 8",
        '3,"a,b",1.25,0',
        '5,"c ""d""",,0.33333333',
    ]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["t.csv"]


def test_parquet_keeps_types_and_every_digit(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "t.parquet", COLUMNS)
    found = parquet.read_table(tmp_path / "t.parquet")
    assert found.to_pydict() == COLUMNS | {"bpd": [1.25, None]}
    assert [str(kind) for kind in found.schema.types] == ["int64", "string", "double", "double"]


def test_a_column_that_is_not_known_at_all_is_still_of_numbers(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "t.parquet", {"error": [math.nan, math.nan]})
    assert str(parquet.read_schema(tmp_path / "t.parquet").field("error").type) == "double"


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_of_the_same_kind_is_overwritten(tmp_path, name):
    pytest.importorskip("pyarrow")
    path = tmp_path / "new" / name
    claim_table(path, LEADING)
    assert list(path.parent.iterdir()) == []
    write_table(path, COLUMNS)
    claim_table(path, LEADING)
    with pytest.raises(ArgumentError, match=rf"{name} exists and is no such table \(index, bpd, ...\)"):
        claim_table(path, ("index", "bpd"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"name,index\n", b"PAR1", b'"index'])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_another_file_is_left_alone(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match="exists and is no such table"):
        claim_table(tmp_path / name, LEADING)
    assert (tmp_path / name).read_bytes() == content


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"must end in .csv or .parquet, got .*t.txt"):
        claim_table(tmp_path / "t.txt", LEADING)


def test_an_error_names_the_file_and_not_the_name_aside(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    monkeypatch.setattr("perrin.files.aside", lambda path: path.parent / "none" / "hidden.csv")
    for write in (lambda: claim_table(path, LEADING), lambda: write_table(path, COLUMNS)):
        with pytest.raises(FileNotFoundError) as caught:
            write()
        assert caught.value.filename == str(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("perrin.evaluation.tables.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"parquet needs pyarrow \(pip install 'perrin\[data\]'\)"):
        claim_table(tmp_path / "t.parquet", LEADING)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    claim_table(tmp_path / "t.csv", LEADING)


# The curve

CURVE = [
    Term(t=0, timestep=0, log_snr=9.0, bpd=0.1, error=0.01),
    Term(t=1, timestep=4, log_snr=1.0, bpd=0.4, error=0.02),
    Term(t=2, timestep=9, log_snr=-math.inf, bpd=0.2, error=0.03),
]


def axes_of(curve, path, monkeypatch):
    from matplotlib.figure import Figure

    figures, original = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))
    )
    plot_terms(curve, path)
    return figures[0].axes


def test_the_curve_as_a_table():
    columns = columns_of(CURVE)
    assert list(columns) == ["t", "timestep", "log_snr", "bpd", "error_bpd"]
    assert columns["timestep"] == [0, 4, 9]
    assert columns["error_bpd"] == [0.01, 0.02, 0.03]


def test_the_plot_has_the_terms_and_their_sum_without_the_level_of_no_signal(tmp_path, monkeypatch):
    terms, sums = axes_of(CURVE, tmp_path / "x.png", monkeypatch)
    assert terms.lines[0].get_xydata().tolist() == [[9, 0.1], [1, 0.4]]
    assert sums.lines[0].get_xydata().tolist() == [[9, 0.1], [1, 0.5]]
    assert (terms.get_yscale(), terms.get_ylabel(), sums.get_ylabel()) == ("log", *["bits per dimension"] * 2)
    assert terms.get_xlabel() == "log-SNR (noise grows to the right)"
    assert terms.xaxis_inverted()
    (band,) = terms.collections
    edges = sorted({round(y, 6) for y in band.get_paths()[0].vertices[:, 1].tolist()})
    assert edges == [0.09, 0.11, 0.38, 0.42]


def test_terms_below_zero_and_errors_that_are_not_known_can_be_drawn(tmp_path, monkeypatch):
    curve = [term._replace(bpd=-1.0, error=math.nan) for term in CURVE]
    terms, _ = axes_of(curve, tmp_path / "x.png", monkeypatch)
    assert terms.get_yscale() == "linear"


def test_a_term_next_to_nothing_does_not_flatten_the_others(tmp_path, monkeypatch):
    terms, _ = axes_of([CURVE[0]._replace(bpd=1e-30), CURVE[1]], tmp_path / "x.png", monkeypatch)
    assert terms.get_ylim()[0] == pytest.approx(0.4e-5)


def test_the_plot_knows_its_own(tmp_path):
    plot_terms(CURVE, tmp_path / "x.png")
    assert is_plot(tmp_path / "x.png")
    Image.new("L", (2, 2)).save(tmp_path / "y.png")
    (tmp_path / "z.png").write_text("text")
    assert not any(is_plot(tmp_path / name) for name in ("y.png", "z.png", "none.png"))
