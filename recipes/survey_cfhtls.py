"""A survey of magnitudes with spectroscopic redshifts, for photometric redshifts by masked models and boosted trees.

Source: CFHTLS photometry of galaxies with redshifts of DEEP2/3 (Zhou et al. 2019, MNRAS 488, 4565) and 3D-HST, in the one table
    that dirac-institute/photoz_template_learning publishes (15,878 galaxies, redshifts to 3.3); AB magnitudes in u, g, r, i, z
    and y, where i2 is the filter that replaced i.
Data: the table. It has no positions, so galaxies are split at random.

    python recipes/survey_cfhtls.py --out surveys/cfhtls --first.path combined_catalog.fits.gz
"""

from pathlib import Path

from armillary.engine.data.building.survey_recipe import Preparation, Read, main

MARKS = (99.0, -99.0)  # not detected, not observed
BANDS = ("u", "g", "r", "i", "i2", "z", "y")

SURVEY = Preparation(
    name="cfhtls-photometry",
    first=Read(
        "table",
        Path("combined_catalog.fits.gz"),
        options={
            "vectors": {"magnitudes": BANDS, "magnitudes_err": tuple(f"{band}err" for band in BANDS)},
            "components": {"magnitudes": BANDS, "magnitudes_err": BANDS},
            "units": {"magnitudes": "AB mag", "magnitudes_err": "AB mag"},
            "labels": ("redshift",),
            "missing": MARKS,
        },
    ),
    test_fraction=0.2,
)

if __name__ == "__main__":
    main(SURVEY)
