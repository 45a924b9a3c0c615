"""Surveys whose samples hold any mix of images, spectra and vectors: packed, checked, read, decoded."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from mixed import GRID, VECTORS, Mixed

from armillary.engine.data.building.build import build
from armillary.engine.data.format import codec
from armillary.engine.data.format.spectra import LOG_IVAR_STEP, Spectrum, decode_spectrum, encode_spectrum
from armillary.engine.data.format.survey import Survey, VectorRecord, WaveGrid
from armillary.engine.data.format.vectors import decode_vectors, encode_vectors
from armillary.engine.data.inspect.check import check_survey
from armillary.engine.data.loading.loader import Loader, SequentialLoader
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample

READERS = ["webdataset", pytest.param("dali", marks=pytest.mark.skipif(sys.platform != "linux", reason="DALI"))]


def packed(folder, source=None, **options):
    return build(source or Mixed(), folder, name="mixed", samples_per_shard=8, progress=False, **options)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "survey"
    packed(folder)
    return folder


def test_description_round_trips(survey):
    found = Survey.load(survey)
    assert found.modalities == ("image", "spectrum", "vectors") and found.vectors == VECTORS
    assert found.spectrum.grid == GRID and found.spectrum.codec == "bitplane"
    assert Survey.from_json(found.to_json()) == found
    mean, std = found.statistics.vectors["photometry"]
    train = [Mixed().read(i) for i in range(20)]
    keys = {s.key for s in map(PackedSurvey(survey, "train").read, range(found.count("train")))}
    values = np.array([s.vectors["photometry"] for s in train if s.key in keys and s.vectors])
    np.testing.assert_allclose(mean, np.nanmean(values, 0), rtol=1e-6)
    np.testing.assert_allclose(std, np.nanstd(values, 0), rtol=1e-6)


def test_the_bytes_do_not_depend_on_processes(survey, tmp_path):
    packed(tmp_path / "two", processes=2)
    for path in survey.iterdir():
        if path.name != "survey.json":  # which holds the date
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_every_sample_comes_back(survey):
    original = {s.key: s for s in map(Mixed().read, range(20))}
    source = PackedSurvey(survey)
    for i in range(len(source)):
        found = source.read(i)
        sample = original.pop(found.key)
        assert (found.ra, found.labels, found.source) == (sample.ra, sample.labels, sample.source)
        assert (found.image is None) == (sample.image is None) and found.valid is None
        if sample.image is not None:
            step = np.array(source.survey.step)[:, None, None]
            assert (np.abs(found.image - sample.image) <= step / 2 * 1.0001).all()
        assert (found.spectrum is None) == (sample.spectrum is None)
        assert set(found.vectors) == set(sample.vectors)
        for name, values in sample.vectors.items():
            np.testing.assert_array_equal(found.vectors[name], values)
    assert not original


def test_packing_a_packed_survey_again_gives_the_same_samples(survey, tmp_path):
    first = PackedSurvey(survey)
    packed(tmp_path / "again", first)
    again = PackedSurvey(tmp_path / "again")
    mine = {s.key: s for s in map(first.read, range(len(first)))}
    for theirs in map(again.read, range(len(again))):
        ours = mine[theirs.key]
        assert (theirs.image is None) or np.array_equal(ours.image, theirs.image)
        assert {k: v.tobytes() for k, v in ours.vectors.items()} == {k: v.tobytes() for k, v in theirs.vectors.items()}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("modalities", [None, ("spectrum",), ("image", "vectors")])
def test_batches_hold_what_is_asked_for(survey, reader, modalities):
    source = PackedSurvey(survey, "train")
    first = source.survey.count("train")
    seen = 0
    for batch in SequentialLoader(survey, split="train", batch=6, device="cpu", reader=reader, modalities=modalities):
        wanted = modalities or ("image", "spectrum", "vectors")
        assert ("image" in batch, "spectrum" in batch, "vectors" in batch) == tuple(
            name in wanted for name in ("image", "spectrum", "vectors")
        )
        for i, row in enumerate(batch["row"].tolist()):
            sample = source.read(row)
            seen += 1
            if "image" in batch:
                there = batch["has_image"][i].item() if "has_image" in batch else True
                assert there == (sample.image is not None)
                expected = np.zeros((3, 20, 24)) if sample.image is None else sample.image
                np.testing.assert_array_equal(batch["image"][i].numpy(), expected)
            if "spectrum" in batch:
                there = batch["has_spectrum"][i].item() if "has_spectrum" in batch else True
                assert there == (sample.spectrum is not None)
                zero = np.zeros(GRID.count, np.float32)
                flux, ivar = (zero, zero) if sample.spectrum is None else (sample.spectrum.flux, sample.spectrum.ivar)
                np.testing.assert_array_equal(batch["spectrum"][i].numpy(), flux)
                np.testing.assert_array_equal(batch["spectrum_ivar"][i].numpy(), ivar)
            if "vectors" in batch:
                expected = [sample.vectors.get(v.name, np.full(v.size, np.nan)) for v in VECTORS]
                np.testing.assert_array_equal(batch["vectors"][i].numpy(), np.concatenate(expected))
    assert seen == first


def test_an_absent_spectrum_has_no_data_also_beside_spectra_without_a_mask(tmp_path):
    class Unmasked(Mixed):
        def read(self, index):
            return super().read(index + 20)  # from 20 on, Mixed masks no pixel

    packed(tmp_path / "s", Unmasked())
    options = {"split": "train", "batch": 20, "device": "cpu", "reader": "webdataset", "modalities": ("spectrum",)}
    (batch,) = SequentialLoader(tmp_path / "s", **options)
    there = batch["has_spectrum"]
    assert there.any() and not there.all()
    assert (batch["spectrum_ivar"][there] > 0).all()
    assert not batch["spectrum_ivar"][~there].any() and not batch["spectrum"][~there].any()


@pytest.mark.parametrize("modality", ["image", "spectrum"])
def test_a_blob_of_another_codec_is_corrupt(tmp_path, modality):
    """Also an image that is handed out as a blob: the kernel that decodes it would make zeros of it."""
    packed(tmp_path / "s")
    source = PackedSurvey(tmp_path / "s", "train")
    lacking = [i for i in range(len(source)) if getattr(source.read(i), modality) is None]
    record = json.loads((tmp_path / "s" / "survey.json").read_text())
    (record if modality == "image" else record["spectrum"])["codec"] = "float16"
    del record["sha256"]
    (tmp_path / "s" / "survey.json").write_text(json.dumps(record))
    options = {"split": "train", "batch": 4, "device": "cpu", "reader": "webdataset", "packed": True}
    with pytest.raises(codec.CorruptBlob, match="its codec is bitplane, the survey's is float16"):
        list(SequentialLoader(tmp_path / "s", **options))
    rows = [i for b in SequentialLoader(tmp_path / "s", **options, on_corrupt="skip") for i in b["row"].tolist()]
    assert rows == lacking and lacking


def test_both_readers_give_the_same_batches(survey):
    both = []
    for reader in ("webdataset", "dali"):
        with Loader(survey, micro_batch=4, device="cpu", reader=reader, seed=3) as loader:
            both.append([next(loader) for _ in range(7)])
    for one, other in zip(*both, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [(False, True, False), (False, False, True), (False, True, True)], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_surveys_without_images(tmp_path, parts, reader):
    class OnlyWhole(Mixed):
        def read(self, index):
            return super().read(5 * index)  # samples that lack nothing

    build(OnlyWhole(12, *parts), tmp_path / "s", name="s", progress=False, samples_per_shard=5)
    found = Survey.load(tmp_path / "s")
    assert found.bands == () and found.height == 0 and not check_survey(tmp_path / "s")
    batch = next(iter(SequentialLoader(tmp_path / "s", split="train", batch=4, device="cpu", reader=reader)))
    assert set(batch) - {"row", "position"} == set().union(
        {"spectrum", "spectrum_ivar"} if parts[1] else set(), {"vectors"} if parts[2] else set()
    )


@pytest.mark.parametrize("name", ["spectrum", "vectors"])
def test_a_damaged_part_is_named_and_can_be_skipped(tmp_path, name):
    packed(tmp_path / "s")
    source = PackedSurvey(tmp_path / "s", "train")
    row = next(i for i in range(len(source)) if getattr(source.read(i), name))
    from armillary.engine.data.format.shards import read_index
    from armillary.engine.data.format.survey import MODALITIES

    place = source.catalog.slice(row, 1).to_pylist()[0]
    path = tmp_path / "s" / source.survey.shards[place["shard"]].name
    part = read_index(path.with_suffix(".idx"))[place["index"]].part(MODALITIES[name])
    with open(path, "r+b") as f:
        f.seek(part.offset + part.size - 3)
        f.write(b"\xff\xfe\xfd")
    with pytest.raises(BadSample, match=f"sample '{place['key']}'.*corrupt blob"):
        source.read(row)
    problems = check_survey(tmp_path / "s", checksums=False)
    assert [p.key for p in problems] == [place["key"]]
    options = {"split": "train", "batch": 4, "device": "cpu", "reader": "webdataset"}
    with pytest.raises(codec.CorruptBlob, match=f"sample '{place['key']}'"):
        list(SequentialLoader(tmp_path / "s", **options))
    loader = SequentialLoader(tmp_path / "s", on_corrupt="skip", **options)
    rows = [r for batch in loader for r in batch["row"].tolist()]
    assert len(rows) == len(source) - 1 and row not in rows and loader.corrupt == 1
    intact = {"image", "spectrum", "vectors"} - {name}
    assert len(list(SequentialLoader(tmp_path / "s", modalities=sorted(intact), **options)))  # it is not even looked at


def test_modalities_that_the_survey_lacks_are_refused(tmp_path):
    packed(tmp_path / "s", Mixed(12, spectra=False))
    for wrong in (("spectrum",), (), ("sound",)):
        with pytest.raises(ValueError, match=r"modalities: must be some of the survey's \(image, vectors\)"):
            Loader(tmp_path / "s", micro_batch=2, device="cpu", modalities=wrong)


class TestSpectra:
    def make(self, length=300, seed=0):
        rng = np.random.default_rng(seed)
        ivar = (10 ** rng.uniform(-3, 3, length)).astype(np.float32)
        ivar[1:][rng.random(length - 1) < 0.1] = 0
        flux = (rng.normal(0, 50, length)).astype(np.float32)
        flux[ivar == 0] = np.nan  # says nothing where there is no data
        return Spectrum(flux, ivar)

    @pytest.mark.parametrize("length", [2, 17, 300, 7781])
    def test_error_is_within_a_sixteenth_of_the_best_noise(self, length):
        spectrum = self.make(length)
        found = decode_spectrum(encode_spectrum(spectrum))
        seen = spectrum.ivar > 0
        assert (found.ivar[~seen] == 0).all() and (found.flux[~seen] == 0).all()
        sigma = np.percentile(1 / np.sqrt(spectrum.ivar[seen].astype(np.float64)), 10)
        assert np.abs(found.flux - spectrum.flux)[seen].max() <= sigma / 16 * 1.001
        assert np.abs(np.log2(found.ivar[seen] / spectrum.ivar[seen])).max() <= LOG_IVAR_STEP / 2 * 1.01

    def test_half_precision(self):
        spectrum = self.make()
        found = decode_spectrum(encode_spectrum(spectrum, "float16"))
        seen = spectrum.ivar > 0
        np.testing.assert_allclose(found.flux[seen], spectrum.flux[seen], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda s: replace(s, flux=s.flux[:-1]), "vectors of one length"),
            (lambda s: replace(s, ivar=-s.ivar), "ivar must be finite and >= 0, pixel"),
            (lambda s: replace(s, ivar=s.ivar * 0), "no pixel carries data"),
            (lambda s: replace(s, flux=s.flux * np.inf), "flux of pixel .* is not finite"),
        ],
    )
    def test_bad_spectra_are_refused(self, change, match):
        with pytest.raises(ValueError, match=match):
            encode_spectrum(change(self.make()))


class TestVectors:
    def test_round_trip_is_exact(self):
        values = {"sfh": np.array([0, -1.5, np.nan, 1e-38, 3e38, 1, 2], np.float32)}
        found = decode_vectors(encode_vectors(values, VECTORS), VECTORS)
        assert np.isnan(found[:3]).all() and found[3:].tobytes() == values["sfh"].tobytes()

    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"mass": np.zeros(1, np.float32)}, "vector 'mass': the source does not declare it"),
            ({"sfh": np.zeros(6, np.float32)}, r"vector 'sfh': must have 7 components, got shape \(6,\)"),
            ({"photometry": np.array([1, np.inf, 2], np.float32)}, "component 'r' is infinite"),
        ],
    )
    def test_bad_vectors_are_refused(self, values, match):
        with pytest.raises(ValueError, match=match):
            encode_vectors(values, VECTORS)

    def test_damage_is_seen(self):
        blob = bytearray(encode_vectors({"sfh": np.ones(7, np.float32)}, VECTORS))
        for i in range(len(blob)):
            broken = bytes(blob[:i]) + bytes([blob[i] ^ 1]) + bytes(blob[i + 1 :])
            with pytest.raises(codec.CorruptBlob):
                decode_vectors(broken, VECTORS)
        with pytest.raises(codec.CorruptBlob, match="values in"):
            decode_vectors(bytes(blob), (*VECTORS, VectorRecord("more", ("x",), "")))
        with pytest.raises(codec.CorruptBlob, match="too short"):
            decode_vectors(b"ARMV", VECTORS)


class TestGrid:
    @pytest.mark.parametrize(
        ("wave", "kind"),
        [
            (3600 + 0.8 * np.arange(7781), "linear"),
            (10 ** (3.55 + 1e-4 * np.arange(4600)), "log10"),
            (np.array([1.0, 2.0, 5.0]), "table"),
        ],
    )
    def test_kind_is_found_and_wavelengths_come_back(self, wave, kind):
        grid = WaveGrid.of(wave)
        assert grid.kind == kind
        np.testing.assert_allclose(grid.angstrom(), wave, rtol=1e-6)

    @pytest.mark.parametrize(
        "wave", [[1.0, np.nan, 3.0], [3.0, 2.0, 1.0], [0.0, 1.0], [-1.0, 1.0], [1.0], [1.0, 1.0], [[1.0, 2.0]]]
    )
    def test_grids_that_are_none_are_refused(self, wave):
        with pytest.raises(ValueError, match="wavelength grid"):
            WaveGrid.of(np.array(wave))
