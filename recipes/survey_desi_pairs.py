"""A survey of galaxies with an image, a spectrum and a stellar mass, for AstroCLIP and its evaluation.

Source: images of Stein et al. 2021 (arXiv:2110.13151), DESI early data release spectra (arXiv:2306.06308) with Redrock's
    redshifts, PROVABGS stellar masses (arXiv:2202.01809). AstroCLIP (arXiv:2310.03024) pairs 197,632 objects in this way;
    its authors also publish the pairs ready made:
    armillary data build astroclip_desi.1.1.5.h5 --out surveys/desi-pairs
Data: the files as published, in three folders; positions are matched within 1 arcsec, PROVABGS by DESI's TARGETID.
Expected: not run here, because the files (60 GB and more) have not been at hand.

    python recipes/survey_desi_pairs.py --out surveys/desi-pairs --first.path /data/stein \\
        --matches.0.read.path /data/desi/fuji/healpix/sv3/bright --matches.1.read.path /data/provabgs
"""

from pathlib import Path

from armillary.engine.data.building.survey_recipe import Key, Preparation, Read, Sky, With, main

SURVEY = Preparation(
    name="desi-pairs",
    first=Read(
        "stein",
        Path("/data/stein"),
        cuts=("mag(flux_z) < 20", "source_type != PSF"),
        drop_duplicates_arcsec=1.0,
    ),
    matches=(
        With(Read("desi", Path("/data/desi"), cuts=("zwarn == 0", "spectype == GALAXY")), Sky(radius_arcsec=1.0)),
        With(Read("provabgs", Path("/data/provabgs")), Key("targetid"), required=False, name="provabgs"),
    ),
    # Galaxies cluster: tiles of .84 square degrees keep neighbours, and objects observed twice, in one split.
    split="healpix:64",
    test_fraction=0.2,
)

if __name__ == "__main__":
    main(SURVEY)
