import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.inspect.colour import MASKED, galaxy_picture, lupton_rgb
from armillary.engine.evaluate.page.figures import interval_chart, line_chart, point_map, prediction_chart
from armillary.engine.evaluate.page.pictures import channels_rgb, data_uri, mosaic, picture_map
from armillary.engine.evaluate.probes.scores import score

STATISTICS = Statistics((0.0,) * 3, (0.1,) * 3, (0.0,) * 3, ((1.0, 0, 0), (0, 1, 0), (0, 0, 1)), 1)
SURVEY = Survey("s", ("g", "r", "z"), 8, 8, 0.262, "nanomaggy", "bitplane", (0.007, 0.013, 0.032), (), (), STATISTICS)


def test_red_galaxies_are_red():
    image = np.zeros((3, 8, 8), np.float32)
    image[:, 4, 4] = [0.05, 0.3, 1.0]
    red, green, blue = lupton_rgb(image, None, SURVEY)[4, 4].astype(int)
    assert red > green > blue
    assert lupton_rgb(image[::-1].copy(), None, SURVEY)[4, 4, 2] == 255


def test_saturated_cores_keep_their_hue():
    flux = np.array([1.0, 2.0, 4.0], np.float32)[:, None, None] * np.ones((3, 1, 2), np.float32)
    rgb = lupton_rgb(flux * np.array([[[10.0, 1000.0]]], np.float32), None, SURVEY).astype(float)[0]
    np.testing.assert_allclose(rgb[0] / rgb[0].max(), rgb[1] / rgb[1].max(), atol=0.02)
    assert rgb[1].max() == 255


def test_brighter_is_brighter_and_sky_is_dark():
    levels = np.array([0.0, 0.01, 0.03, 0.1, 0.3], np.float32)
    grey = lupton_rgb(np.tile(levels, (3, 1, 1)), None, SURVEY)[0].astype(int)
    assert (np.diff(grey.sum(1)) > 0).all()
    assert grey[0].max() < 40


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_any_number_of_bands(bands):
    statistics = replace(STATISTICS, std=(0.1,) * bands)
    survey = replace(SURVEY, bands=tuple("abcde"[:bands]), sky_sigma=(0.01,) * bands, statistics=statistics)
    rgb = lupton_rgb(np.ones((bands, 4, 6), np.float32), None, survey)
    assert rgb.shape == (4, 6, 3)
    assert rgb.dtype == np.uint8


def test_survey_without_noise_or_spread():
    survey = replace(SURVEY, sky_sigma=(0.0,) * 3, unit="adu", statistics=replace(STATISTICS, std=(0.0,) * 3))
    assert lupton_rgb(np.ones((3, 4, 4), np.float32), None, survey).max() > 0


def test_masked_and_non_finite_pixels():
    image = np.ones((3, 4, 4), np.float32)
    image[0, 0, 0] = np.nan
    valid = np.ones((3, 4, 4), bool)
    valid[:, 1, 1] = False
    rgb = lupton_rgb(image, valid, SURVEY)
    assert tuple(rgb[1, 1]) == MASKED
    assert np.isfinite(rgb).all()


def test_display_pictures_stay_as_they_are():
    survey = replace(SURVEY, unit="count", bands=("R", "G", "B"))
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 5)).astype(np.float32)
    np.testing.assert_array_equal(galaxy_picture(image, None, survey), image.transpose(1, 2, 0).astype(np.uint8))


def test_sky_pictures_have_their_first_row_at_the_bottom():
    image = np.zeros((3, 4, 4), np.float32)
    image[:, 0, 2] = 1
    picture = galaxy_picture(image, None, SURVEY)
    assert picture[3, 2].sum() > picture[0, 2].sum()


def test_channels_use_their_own_range():
    x = np.random.default_rng(0).normal(size=(3, 16, 16)) * np.array([1, 10, 100])[:, None, None]
    rgb = channels_rgb(x)
    assert rgb.reshape(-1, 3).min(0).tolist() == [0, 0, 0]
    assert rgb.reshape(-1, 3).max(0).tolist() == [255, 255, 255]
    assert channels_rgb(np.full((1, 4, 4), 3.0)).max() == 0


def test_data_uri_is_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    raw = base64.b64decode(data_uri(picture, enlarge=2).partition(",")[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(raw)))[::2, ::2], picture)


def test_mosaic_with_a_short_row():
    pictures = [np.full((4, 5, 3), 10 * (i + 1), np.uint8) for i in range(3)]
    sheet = mosaic(pictures, 2, gap=1)
    assert sheet.shape == (9, 11, 3)
    assert sheet[5, 0, 0] == 30
    assert sheet[8, 8, 0] == 0


@pytest.mark.parametrize("count", [1, 50])
def test_picture_map_puts_pictures_where_points_are(count):
    points = np.random.default_rng(0).uniform(size=(count, 2))
    pictures = [np.full((10, 10, 3), 200, np.uint8)] * count
    sheet = picture_map(points, pictures, cells=4, cell_pixels=10)
    assert sheet.shape == (40, 40, 3)
    row, column = (3, 0) if count == 1 else (3 - int(points[0, 1] // 0.26), None)
    if column is not None:
        assert sheet[row * 10 + 5, column * 10 + 5, 0] == 200
    filled = (sheet[5::10, 5::10, 0] > 0).sum()
    assert 1 <= filled <= min(count, 16)


def test_intervals_share_a_scale():
    rows = interval_chart([0.5, 0.7, float("nan")], [0.01, float("nan"), 0.1], [0, 1, 2])
    places = [float(row.partition('cx="')[2].partition('"')[0]) for row in rows[:2]]
    assert places[0] < places[1]
    assert "circle" not in rows[2]


def test_charts_of_extreme_data():
    steps = np.arange(1000)
    assert "<svg" in line_chart({"a": (steps, np.sin(steps)), "b": (steps[:1], np.ones(1))}, limits={"top": 1.0})
    assert "<svg" in line_chart({"constant": (steps, np.zeros(1000))})
    true = np.full(5, 0.3)
    assert "undefined" in prediction_chart(true, true, score(true, true), label="z", redshift=True)
    one = np.array([0.3])
    assert "<svg" in prediction_chart(one, one + 0.1, score(one, one + 0.1), label="z", redshift=True)
    assert "<svg" in point_map(np.zeros((3, 2)), np.array([1.0, np.nan, 2.0]), label="z")
    assert "<svg" in point_map(np.zeros((3, 2)), None)


def test_chart_text_is_escaped():
    assert "<b>" not in line_chart({"<b>": (np.arange(3), np.arange(3)), "c": (np.arange(3), np.arange(3))})
