"""A survey of simulated LSST magnitudes with redshifts, for photometric redshifts by masked models and boosted trees.

Source: galaxies of the LSST DESC's second data challenge, CosmoDC2 (Korytov et al. 2019, ApJS 245, 26), in the file that RAIL
    ships with its tests (LSSTDESC/rail_base, test_dc2_training_9816.hdf5): 10,225 galaxies, redshifts to 3.
Data: the file. It has no positions, so galaxies are split at random by their identifier.

    python recipes/survey_dc2.py --out surveys/dc2 --first.path test_dc2_training_9816.hdf5
"""

from pathlib import Path

from armillary.engine.data.building.survey_recipe import Preparation, Read, main

MARKS = (99.0, -99.0)  # not detected, not observed
BANDS = tuple("ugrizy")

SURVEY = Preparation(
    name="dc2-photometry",
    first=Read(
        "table",
        Path("test_dc2_training_9816.hdf5"),
        options={
            "table": "photometry",
            "key": "id",
            "vectors": {
                "magnitudes": tuple(f"mag_{band}_lsst" for band in BANDS),
                "magnitudes_err": tuple(f"mag_err_{band}_lsst" for band in BANDS),
            },
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
