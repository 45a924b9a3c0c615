"""MOSAIC: redshift, masses, photometry, star-formation history and energy distribution of galaxies, any from any.

Source: Xia et al. 2025 (MOSAIC, arXiv:2510.07684). Neither code, nor sizes, nor data of that model are public.
Data: SuperMock, release 3, of the authors' group (the paper's 205,830 galaxies are an earlier one):
    armillary data build SUPERMOCK --kind supermock --option resample_sed=true --option every=170 --validation-fraction 0.1 \\
        --test-fraction 0.1 --out surveys/supermock
Hardware: not published. Not run here.
Expected: redshifts better by 50 % with SPHEREx than with LSST alone, stellar masses by 63 % with the late than with the early
    history (paper). Neither the measure nor the cut is published: docs/studies.md has both for every cut, with noise and without.

    deepspeed recipes/mosaic.py --data.path surveys/supermock

    recipe (published)  what is known: an encoder over scalars and vectors, hidden by quantity and by token, and point estimates;
                        the sizes, rates and schedule are our own choice. Fluxes are without noise.
    --preset improved   distributions with copulas; levels apart from shapes; blocks are hidden, and what questions leave out;
                        noise drawn anew in each epoch, with errors as inputs. It needs a survey with errors:
    armillary data simulate-photometry --count 200000 --validation-fraction 0.1 --out surveys/simulated
    --preset photoz     magnitudes and redshifts of a real survey: recipes/survey_cfhtls.py, recipes/survey_dc2.py

Then `armillary calibrate RUN`, and ask: `armillary query RUN TABLE --given photometry_lsst --want redshift,stellar_mass`.

A new modality enters by declaration: with embeddings of images as a vector of the survey, one more
QuantityView(name="dinov2", vector="dinov2", runs=8) is all.

Presets for a laptop's CPU, on simulated galaxies (`make demo-mosaic`):

    armillary data simulate-photometry --count 8000 --validation-fraction 0.1 --out runs/demo-mosaic/survey
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 recipes/mosaic.py --preset smoke --device cpu \\
        --data.path runs/demo-mosaic/survey

    --preset smoke                    all quantities
    --preset headline                 those of the two questions of the paper's abstract
    --preset headline_without_noise   the same with fluxes as they are

Measured: docs/studies.md has one seed of `headline` and three of `photoz`. No other preset has been trained to its end.
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.engine.train.start import main
from armillary.models.masked.heads import HeadConfig
from armillary.models.mosaic.masking import Masking
from armillary.models.mosaic.mosaic import MOSAIC

EPOCH = 185_247 // 512  # steps, of the paper's training galaxies
BANDS = ("u", "g", "r", "i", "z", "y")

# Quantities: redshift and masses; photometry; history on t/t(z), since its end at t(z) would tell the redshift; light.
REDSHIFT = QuantityView(name="redshift", scaling="log1p")
STELLAR_MASS = QuantityView(name="stellar_mass", unit="Msun", scaling="log10")
HALO_MASS = QuantityView(name="halo_mass", unit="Msun", scaling="log10")
LSST = QuantityView(name="photometry_lsst", vector="photometry_lsst", components=BANDS, scaling="log10", runs=6)
SPHEREX = QuantityView(name="photometry_spherex", vector="photometry_spherex", scaling="log10", runs=6)
HISTORY = QuantityView(name="sfh", vector="sfh", scaling="asinh", softening=0.05, runs=6)
LIGHT = QuantityView(name="sed", vector="sed", scaling="log10", runs=20, levels=True)

# As measured: one token for six bands, and noise of the stated errors and of 1 % of the flux in each epoch anew.
MEASURED_LSST, MEASURED_SPHEREX = (
    replace(q, errors=(f"{q.name}_err",), error_floor=0.01, noise="redrawn", scaling="asinh", runs=runs, levels=True)
    for q, runs in ((LSST, 1), (SPHEREX, 6))
)
CUTS = (9, 18, 27, 32)  # of the 36 bins of the history: 25, 50, 75 and 89 % of cosmic time
QUESTIONS = (
    ("photometry_lsst",),
    ("photometry_lsst", "photometry_spherex"),
    *(("photometry_lsst", f"sfh[0:{cut}]") for cut in CUTS),
    *(("photometry_lsst", f"sfh[{cut}:36]") for cut in CUTS),
)

RECIPE = Run(
    name="mosaic",
    method=MOSAIC(
        dim=256,
        depth=6,
        heads=8,
        dropout=0.1,
        scalar_head=HeadConfig("point", 1),
        vector_head=HeadConfig("point", 1),
        rank=0,
        masking=Masking(block=0.0, scattered=1.0, share=(0.0, 0.75)),
    ),
    views=ObjectViews(quantities=(REDSHIFT, STELLAR_MASS, HALO_MASS, LSST, SPHEREX, HISTORY, LIGHT)),
    data=Data(path=Path("surveys/supermock"), threads=8),
    optim=Optim(lr=3e-4, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=5 * EPOCH), weight_decay=Constant(0.05)),
    train=Training(steps=100 * EPOCH, global_batch=512, micro_batch=512),
    checkpoint=Checkpointing(every_steps=10 * EPOCH, keep=2),
)

IMPROVED = replace(
    RECIPE,
    name="mosaic_improved",
    method=MOSAIC(masking=Masking(questions=(*QUESTIONS, ("sfh",), ("sed",)), question_share=0.3)),
    views=ObjectViews(
        quantities=(
            REDSHIFT, STELLAR_MASS, HALO_MASS, MEASURED_LSST, MEASURED_SPHEREX,
            replace(HISTORY, levels=True), replace(LIGHT, runs=8),
        )
    ),
    data=replace(RECIPE.data, path=Path("surveys/simulated")),
)  # fmt: skip

SMOKE = replace(
    IMPROVED,
    name="mosaic_smoke",
    method=MOSAIC(
        dim=64,
        depth=3,
        heads=4,
        mlp_ratio=2,
        weights=(("redshift", 2.0), ("stellar_mass", 2.0)),
        masking=replace(IMPROVED.method.masking, asked=0.5),
    ),
    views=ObjectViews(quantities=(*IMPROVED.views.quantities[:-1], replace(LIGHT, runs=4))),
    data=Data(path=Path("runs/demo-mosaic/survey"), threads=1),
    optim=Optim(lr=2e-3, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=50), weight_decay=Constant(0.02)),
    train=Training(steps=1500, global_batch=128, micro_batch=64, precision="fp32"),
    checkpoint=Checkpointing(every_steps=750),
)

HEADLINE = replace(
    SMOKE,
    name="mosaic_headline",
    method=replace(
        SMOKE.method,
        depth=2,
        weights=(("redshift", 3.0), ("stellar_mass", 3.0)),
        masking=Masking(questions=QUESTIONS, question_share=0.8, asked=0.1),
    ),
    views=ObjectViews(quantities=tuple(q for q in SMOKE.views.quantities if q.name not in ("halo_mass", "sed"))),
    train=replace(SMOKE.train, steps=900),
)

WITHOUT_NOISE = replace(
    HEADLINE,
    name="mosaic_headline_without_noise",
    views=ObjectViews(quantities=tuple(replace(q, noise="none") if q.errors else q for q in HEADLINE.views.quantities)),
)

PHOTOZ = replace(
    SMOKE,
    name="mosaic_photoz",
    method=replace(
        SMOKE.method, weights=(), scalar_head=HeadConfig("mixture", 6), masking=Masking(block=0.0, scattered=0.5)
    ),
    views=ObjectViews(
        quantities=(
            REDSHIFT,
            QuantityView(name="magnitudes", vector="magnitudes", errors=("magnitudes_err",), levels=True),
        )
    ),
    data=Data(path=Path("surveys/cfhtls"), threads=1),
)

if __name__ == "__main__":
    main(
        RECIPE,
        published=RECIPE,
        improved=IMPROVED,
        smoke=SMOKE,
        headline=HEADLINE,
        headline_without_noise=WITHOUT_NOISE,
        photoz=PHOTOZ,
    )
