"""MMAE: images and spectra of the same galaxies, masked, filled in, and read for a redshift.

Source: Himes et al. 2025 (MMAE, arXiv:2510.22527) and its released code.
Data: GalaxiesML-Spectra, 134,533 pairs of a 64 x 64 pixel g, r, i, z, y cutout of HSC and a DESI spectrum of 7,783 pixels:
    armillary data build DESI_HSC_64x64_v2.hdf5 --kind galaxiesml-spectra --codec float16 --split source \\
        --out surveys/galaxiesml-spectra
    The split is its authors' (94,173 to train on, 20,179 for validation, 20,181 to test). Choose settings with
    `armillary evaluate RUN --test-split validation`.
Hardware: not published. Not run here.
Expected: NMAD of the redshift of .026 from unmasked images alone, within about z < .4 (paper); .030 and 5.2 % of outliers beyond
    .15 over all of the test set (from the authors' predictions). Not run here.

    deepspeed recipes/mmae.py --data.path surveys/galaxiesml-spectra

    recipe (published)  the released code's defaults: 48 of 64 patches and 24 of 32 tokens hidden, no spectra in half of the
                        steps, 100 epochs at a constant learning rate of 1e-4, in float32
    --preset published_restarts   the same with its optional schedule, whose rate changes once an epoch: from a tenth over
                        10 epochs, then cosines of 25, 50 and 100 epochs down to a hundredth

They stay apart from the published runs in these: the last weights count, where there the best of a validation split did; an
epoch leaves out the samples that do not fill a batch; and see `models/mmae/mmae.py` on the spectrum's decoder.

    --preset improved   another model for the same task, not published (`models/mmae/token_drop.py`): hidden tokens are not
                        computed, each sample hides its own share, U(0, .75), or a modality as a whole; p(z) in bins with
                        CRPS; spectra in bins of 4.8 angstrom, decoded in the rest frame at a given redshift; images asinh with
                        a scale a band, flipped and turned. `--method.stem convolutions` for a stem of convolutions

The scales, means and deviations of the five bands are those of DeepZ (github.com/kimbielby, 2026), on the same data.

Two presets run on a laptop's CPU, on simulated pairs of g, r, z images and spectra; `make demo-mmae` trains both:

    armillary data simulate --spectra --validation-fraction 0.16 --out runs/demo-mmae/survey
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 recipes/mmae.py --preset smoke_improved --device cpu \\
        --data.path runs/demo-mmae/survey
    the same with `--preset smoke` for the published model, made small

Measured: docs/studies.md has three seeds of both. No other preset has been trained.
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules, WarmRestarts
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import AsinhScale, AsinhWhiten, Identity
from armillary.engine.train.start import main
from armillary.models.mmae.mmae import MMAE
from armillary.models.mmae.token_drop import TokenDropMMAE

EPOCH = 94_173 // 256  # steps

RECIPE = Run(
    name="mmae",
    method=MMAE(
        patch_size=8,
        bin_pixels=30,
        token_bins=8,
        dim=256,
        depth=4,
        fusion_depth=4,
        heads=8,
        dropout=0.1,
        image_mask=0.75,
        spectrum_mask=0.75,
        spectrum_drop=0.5,
        image_weight=0.1,
        spectrum_weight=0.01,
        redshift_weight=1.0,
        redshift_scale=0.15,
    ),
    views=ObjectViews(
        image=MultiCrop(global_size=64, n_global=1, placement="centre", hflip=0.0, vflip=0.0, stretch=Identity()),
        spectrum=True,
        targets=("redshift",),
    ),
    data=Data(path=Path("surveys/galaxiesml-spectra"), threads=8),
    optim=Optim(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, clip_norm=1.0),
    schedule=Schedules(learning_rate=Constant(), weight_decay=Constant(0.01)),
    train=Training(steps=100 * EPOCH, global_batch=256, micro_batch=256, precision="fp32"),
    checkpoint=Checkpointing(every_steps=10 * EPOCH, keep=2),
)

RESTARTS = replace(
    RECIPE,
    name="mmae_restarts",
    schedule=replace(
        RECIPE.schedule,
        learning_rate=WarmRestarts(
            end=1e-6, warmup_steps=10 * EPOCH, warmup_start=1e-5, period_steps=25 * EPOCH, growth=2, hold_steps=EPOCH
        ),
    ),
)

IMPROVED = replace(
    RECIPE,
    name="mmae_improved",
    method=TokenDropMMAE(),
    views=ObjectViews(
        image=MultiCrop(
            global_size=64,
            n_global=1,
            placement="centre",
            rotation="any",
            stretch=AsinhScale(
                bands=("g", "r", "i", "z", "y"),
                scale=(0.0212, 0.0352, 0.0369, 0.0688, 0.1367),
                mean=(1.600, 1.854, 2.092, 1.824, 1.507),
                std=(1.826, 1.829, 1.949, 1.894, 1.791),
            ),
        ),
        spectrum=True,
        targets=("redshift",),
    ),
    optim=Optim(lr=3e-4, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=5 * EPOCH), weight_decay=Constant(0.05)),
)

SMOKE = Run(
    name="mmae_smoke",
    method=MMAE(dim=64, depth=2, fusion_depth=2, heads=4, dropout=0.0),
    views=ObjectViews(
        image=MultiCrop(
            global_size=48,
            n_global=1,
            placement="centre",
            jitter_px=2,
            quarter_turns=True,
            stretch=AsinhWhiten(ridge=0.03),
        ),
        spectrum=True,
        targets=("redshift",),
    ),
    data=Data(path=Path("runs/demo-mmae/survey"), threads=1),
    optim=Optim(lr=1e-3, clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=20), weight_decay=Constant(0.01)),
    train=Training(steps=800, global_batch=32, micro_batch=16, precision="fp32"),
    checkpoint=Checkpointing(every_steps=200),
)

SMOKE_IMPROVED = replace(
    SMOKE,
    name="mmae_smoke_improved",
    method=TokenDropMMAE(
        dim=64, depth=3, heads=4, decoder_dim=32, decoder_depth=1, rest_points=2304, rest_hidden=128,
        highest_redshift=1.0, redshift_bins=60,
    ),
    schedule=replace(SMOKE.schedule, learning_rate=Cosine(end=0.0, warmup_steps=60)),
    train=replace(SMOKE.train, steps=1800),
)  # fmt: skip

if __name__ == "__main__":
    main(
        RECIPE,
        published=RECIPE,
        published_restarts=RESTARTS,
        improved=IMPROVED,
        smoke=SMOKE,
        smoke_improved=SMOKE_IMPROVED,
    )
