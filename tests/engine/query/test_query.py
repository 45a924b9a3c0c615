"""Questions to a method whose exact answers are known, put to tables of every kind."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy_answers
from toy_answers import MASS, PHOTOMETRY, QUANTITIES, REDSHIFT, SED, LinearGaussianMethod, exported, sampled

from armillary.engine import cli
from armillary.engine.query.query import query
from armillary.engine.user_code import trust
from armillary.engine.weights.trained_encoder import TrainedEncoder

ROWS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trust("toy_answers")
    return exported(tmp_path_factory.mktemp("run") / "toy.safetensors")


@pytest.fixture(scope="module")
def values():
    found = sampled(ROWS)
    photometry = found[PHOTOMETRY.name]
    photometry[0, 1] = math.nan  # a missing band
    photometry[1] = math.nan  # no photometry, but a redshift
    found[REDSHIFT.name][2] = math.nan
    photometry[3], found[REDSHIFT.name][3] = math.nan, math.nan  # nothing
    return found


def columns(values):
    """A catalogue with a column a band, and identifiers beyond 2^53."""
    table = {"objectId": pa.array(2**60 + np.arange(ROWS))}
    table |= {f"photometry_lsst_{b}": pa.array(x) for b, x in zip("gri", values[PHOTOMETRY.name].T, strict=True)}
    table["REDSHIFT"] = pa.array(values[REDSHIFT.name][:, 0])
    return table


@pytest.fixture
def table(values, tmp_path):
    pq.write_table(pa.table(columns(values)), tmp_path / "cat.parquet", row_group_size=7)
    return tmp_path / "cat.parquet"


def exact(run, values, given, want):
    """Mean [ROWS, e] and covariance [ROWS, e, e] of the entries of what is wanted; NaN where nothing is known."""
    method = TrainedEncoder.open(run).method
    entries, shown = [], []
    for q in QUANTITIES:
        t = q.scaling(torch.from_numpy(values[q.name]))
        entries.append(t if q.name in given else torch.full_like(t, math.nan))
        shown.append(torch.full((q.scaling.entries,), q.name in want))
    t, at = torch.cat(entries, 1), torch.cat(shown)
    found = []
    for row in t:
        if row.isnan().all():
            found.append((torch.full((int(at.sum()),), math.nan), torch.full((int(at.sum()),) * 2, math.nan)))
            continue
        mean, covariance = method.conditional(row, ~row.isnan())
        found.append((mean[at].detach(), covariance[at][:, at].detach()))
    return torch.stack([m for m, _ in found]).numpy(), torch.stack([c for _, c in found]).numpy()


def test_answers_are_the_exact_conditional(run, values, table, tmp_path):
    """Medians exactly; quantiles and the covariance of joint draws within the noise of 4,000 draws."""
    given, want = (PHOTOMETRY.name, REDSHIFT.name), (MASS.name, SED.name)
    out = tmp_path / "a.parquet"
    done = query(run, table, out, given=given, want=want, draws=4000, keep_draws=True, batch=16)
    assert (done.rows, done.answered, done.refused) == (ROWS, ROWS - 1, {})
    answers = pq.read_table(out)
    assert answers["objectId"].to_pylist() == (2**60 + np.arange(ROWS)).tolist()
    assert answers["row"].to_pylist() == list(range(ROWS))
    assert answers["known_photometry.lsst"].to_pylist() == [i not in (1, 3) for i in range(ROWS)]
    assert answers["known_redshift"].to_pylist() == [i not in (2, 3) for i in range(ROWS)]
    mean, covariance = exact(run, values, given, want)
    mass = np.asarray(answers["stellar_mass_median"])
    np.testing.assert_allclose(mass, 10 ** (mean[:, 0] * 0.7 + 10), rtol=1e-5)
    sed = np.stack(answers["sed_median"].to_pylist())
    np.testing.assert_allclose(sed, mean[:, 1:] * 2, rtol=1e-4, atol=1e-5)
    # The 84 % quantile of 4,000 draws has an error of .024 standard deviations: 39 rows, none beyond 5 of them.
    for part, z in (("p16", -0.99446), ("p84", 0.99446)):
        expected = mean[:, 0] + z * np.sqrt(covariance[:, 0, 0])
        found = (np.log10(np.asarray(answers[f"stellar_mass_{part}"])) - 10) / 0.7
        np.testing.assert_allclose((found - expected) / np.sqrt(covariance[:, 0, 0]), 0 * expected, atol=0.12)
    drawn = np.concatenate(
        [
            (np.log10(np.stack(answers["stellar_mass_draws"].to_pylist()))[..., None] - 10) / 0.7,
            np.array(answers["sed_draws"].to_pylist()) / 2,
        ],
        axis=2,
    )
    for row in (0, 1, 2, 20):
        width = np.sqrt(np.diag(covariance[row]))
        correlation = np.cov(drawn[row].T) / np.outer(width, width)
        expected = covariance[row] / np.outer(width, width)
        assert np.abs(expected - np.eye(5)).max() > 0.3, "the test would not see draws that are not joint"
        np.testing.assert_allclose(correlation, expected, atol=0.11)  # 5 / sqrt(4000) = .08, .11 on the diagonal
    assert np.isnan(drawn[3]).all() and np.isnan(mass[3]) and np.isnan(sed[3]).all()


def test_answers_do_not_depend_on_batches_or_on_the_format(run, values, table, tmp_path):
    from astropy.table import Table

    whole = {}
    cat = Table({n: np.asarray(c) for n, c in columns(values).items()})
    for name in ("b.csv", "b.fits", "b.ecsv", "b.vot", "b.hdf5"):
        options = {"format": "votable"} if name.endswith("vot") else {"path": "t"} if name.endswith("hdf5") else {}
        cat.write(tmp_path / name, **options)
        whole[name] = 1000
    sizes = {table.name: 1000, **whole}
    found = []
    for name, size in [*sizes.items(), (table.name, 3)]:
        out = tmp_path / "out.parquet"
        query(run, tmp_path / name, out, given=["redshift"], want=["sed"], draws=5, keep_draws=True, batch=size)
        found.append(pq.read_table(out))
    for other in found[1:]:
        assert other.schema.names == found[0].schema.names
        # Identifiers beyond 2^53 in a CSV are text.
        assert [str(i) for i in other["objectId"].to_pylist()] == [str(i) for i in found[0]["objectId"].to_pylist()]
        for name in ("row", "sed_median", "sed_draws"):
            np.testing.assert_allclose(
                np.array(other[name].to_pylist(), float), np.array(found[0][name].to_pylist(), float), rtol=1e-6
            )
    seeded = tmp_path / "seed.parquet"
    query(run, table, seeded, given=["redshift"], want=["sed"], draws=5, keep_draws=True, seed=1)
    assert pq.read_table(seeded)["sed_draws"] != found[0]["sed_draws"]


def test_file_says_what_it_is(run, table, tmp_path):
    query(run, table, tmp_path / "a.parquet", given=["redshift"], want=["sed", "stellar_mass"], draws=3)
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert "sed_draws" not in schema.names
    assert schema.field("sed_median").type == pa.list_(pa.float32(), 4)
    assert schema.field("stellar_mass_p84").metadata == {b"unit": b"solMass"}
    about = json.loads(pq.read_metadata(tmp_path / "a.parquet").metadata[b"armillary"])
    assert about["run"] == "toy" and about["given"] == ["redshift"] and about["draws"] == 3
    assert about["want"][0] == {"name": "sed", "unit": "Jy", "components": list(SED.components), "axis": list(SED.axis)}
    assert about["counts"] == {"rows": ROWS, "answered": ROWS - 2, "refused": {}}
    # What was written can be given in turn: the medians are a column of four numbers.
    again = query(
        run,
        tmp_path / "a.parquet",
        tmp_path / "b.parquet",
        given=["sed"],
        want=["redshift"],
        columns={"sed": ["sed_median"], "sed_err": ["sed_p84"]},
    )
    assert again.answered == ROWS - 2 and again.notes == ("sed: from sed_median; errors from sed_p84",)


def test_values_that_a_scaling_does_not_take_are_counted(run, tmp_path):
    mass = np.array([1e10, -1.0, 0.0, np.nan, np.inf, 3e9])
    pq.write_table(pa.table({"stellar_mass": mass, "redshift": np.full(6, 0.3)}), tmp_path / "m.parquet")
    done = query(run, tmp_path / "m.parquet", tmp_path / "a.parquet", given=["stellar_mass"], want=["redshift"])
    assert (done.answered, done.refused) == (2, {"stellar_mass": 2})
    both = query(run, tmp_path / "m.parquet", tmp_path / "a.parquet", given=["stellar_mass", "redshift"], want=["sed"])
    assert (both.answered, both.refused) == (6, {"stellar_mass": 2})


def test_negative_fluxes_are_fluxes(run, tmp_path):
    pq.write_table(pa.table({"g": [-30.0], "r": [5.0], "i": [100.0]}), tmp_path / "f.parquet")
    done = query(run, tmp_path / "f.parquet", tmp_path / "a.parquet", given=[PHOTOMETRY.name], want=["redshift"])
    assert (done.answered, done.refused) == (1, {})


def test_memory_holds_few_draws(run, table, tmp_path, monkeypatch):
    """A batch becomes as small as the draws need it to be."""
    asked = []
    answer = LinearGaussianMethod.answer

    def watched(self, batch, *rest):
        asked.append(len(batch["row"]))
        return answer(self, batch, *rest)

    monkeypatch.setattr(LinearGaussianMethod, "answer", watched)
    monkeypatch.setattr("armillary.engine.query.query.MOST_NUMBERS", 100)
    query(run, table, tmp_path / "a.parquet", given=["redshift"], want=["sed", "stellar_mass"], draws=5)
    assert max(asked) == 5 and sum(asked) == ROWS - 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--given", "mass"],
            "given: 'mass' is nothing that can be given; there are photometry.lsst, redshift, stellar_mass, sed",
        ),
        (
            ["--want", "halo_mass"],
            "want: 'halo_mass' is nothing that was trained to be answered; there are photometry.lsst, red",
        ),
        (["--given", ""], "given: name one or more of photometry.lsst"),
        (["--given", "photometry.lsst[2:1]"], "given: photometry.lsst[2:1]: must be components within 0:3"),
        (["--given", "photometry.lsst[0:99]"], "given: photometry.lsst[0:99]: must be components within 0:3"),
        (["--want", "sed,sed"], "want: sed, sed names one of them twice"),
        (
            ["--given", "sed"],
            "'sed': no column has this name, nor of its components 4000, 5000, 6000, 7000; name one with --column",
        ),
        (["--column", "sed=x"], "column: 'sed' is not given (redshift), nor errors"),
        (["--column", "redshift"], "column: must be NAME=..., got 'redshift'"),
        (["--column", "redshift=nowhere"], "no column 'nowhere' (declared as 'redshift')"),
        (["--unit", "nowhere=Jy"], "no column 'nowhere' (unit)"),
        (
            ["--unit", "REDSHIFT=km/s"],
            "'km/s' cannot be converted to 'a pure number' (--unit COLUMN=UNIT states another)",
        ),
        (["--unit", "REDSHIFT=parrots"], "'parrots' is not a unit"),
        (["--key", "nobody"], "no column 'nobody' (key)"),
        (["--split", "test"], "split: is for surveys"),
        (["--draws", "0"], "draws: must be positive, got 0"),
        (["--seed", "-1"], "seed: must be in 0"),
        (["-o", "a.fits"], "out: must end in .parquet"),
    ],
)
def test_bad_questions_end_before_work(run, table, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    asked = ["query", str(run), str(table), "--package", "toy_answers"]
    chosen = {"--given": "redshift", "--want": "sed"}
    code = cli.main([*asked, *words, *(w for o, v in chosen.items() if o not in words for w in (o, v))])
    assert (code, message in capsys.readouterr().err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.parquet"]


def test_a_command_lists_what_can_be_asked(run, table, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["query", str(run), "--package", "toy_answers"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "given: photometry.lsst, redshift, stellar_mass, sed"
    assert "  sed [Jy]: 4000, 5000, 6000, 7000" in listed
    words = ["query", str(run), "--given", "photometry.lsst,redshift", "--want", "sed,stellar_mass", str(table)]
    assert cli.main([*words, "--draws", "8", "--package", "toy_answers"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "photometry.lsst: from photometry_lsst_g, photometry_lsst_r, photometry_lsst_i; no unit stated, taken as nJy",
        "redshift: from REDSHIFT",
        "1 rows have nothing known of what is given: their answers are NaN",
        "cat-answers.parquet: answers for 39 of 40 rows",
    ]


def test_absent_and_silent_methods(run, table, tmp_path):
    nothing = pa.table(
        {"redshift": pa.array([None, None], pa.float64()), "stellar_mass": [-1.0, 0.0], "sed": [[1.0] * 4] * 2}
    )
    pq.write_table(nothing, tmp_path / "n.parquet")
    for given in (["redshift"], ["stellar_mass"], ["sed", "redshift"]):
        with pytest.raises(ValueError, match=f"nothing is known of {given[-1]} in any row"):
            query(run, tmp_path / "n.parquet", tmp_path / "a.parquet", given=given, want=[PHOTOMETRY.name])
    short = exported(tmp_path / "short.safetensors", toy_answers.LinearGaussian(unanswered=1))
    with pytest.raises(ValueError, match="want: 'sed' is nothing that was trained"):
        query(short, table, tmp_path / "a.parquet", given=["redshift"], want=["sed"])
    silent = exported(tmp_path / "silent.safetensors", toy_answers.LinearGaussian(unanswered=len(QUANTITIES)))
    with pytest.raises(ValueError, match="is a LinearGaussianMethod, which answers no questions"):
        query(silent, table, tmp_path / "a.parquet", given=["redshift"], want=["sed"])
    with pytest.raises(ValueError, match="is the table itself"):
        query(run, table, table, given=["redshift"], want=["sed"])
    with pytest.raises(FileNotFoundError, match="no such"):
        query(run, tmp_path / "none.parquet", tmp_path / "a.parquet", given=["redshift"], want=["sed"])
    assert not (tmp_path / "a.parquet").exists()


def test_a_method_that_answers_nonsense_is_named(run, table, tmp_path, monkeypatch):
    answer = LinearGaussianMethod.answer

    def wrong(self, batch, given, want, draws, seed):
        return answer(self, batch, given, want, draws + 1, seed)

    monkeypatch.setattr(LinearGaussianMethod, "answer", wrong)
    with pytest.raises(ValueError, match=r"LinearGaussianMethod.answer: 'sed' must be \[B, 5, 4\] draws"):
        query(run, table, tmp_path / "a.parquet", given=["redshift"], want=["sed"], draws=5)
    assert not (tmp_path / "a.parquet").exists()


def test_a_method_that_only_draws_has_no_distributions_to_write(run, table, tmp_path):
    with pytest.raises(ValueError, match="LinearGaussianMethod says no distribution of stellar_mass but draws"):
        query(run, table, tmp_path / "a.parquet", given=("redshift",), want=("stellar_mass",), qp=tmp_path / "p")
    assert not list(tmp_path.glob("a.parquet*"))
