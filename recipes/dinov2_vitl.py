"""DINOv2 pre-training of a ViT-L/12 on Legacy Survey galaxies: the image encoder of AstroCLIP.

Source: Parker et al. 2024 (AstroCLIP, arXiv:2310.03024), section 3.1 and its released code; method: Oquab et al. 2023
    (DINOv2, arXiv:2304.07193); data: Stein et al. 2021 (arXiv:2110.13151).
Data: 152 x 152 pixel g, r, z cutouts of the DESI Legacy Survey, 0.262 arcsec a pixel, in nanomaggies:
    armillary data build STEIN_FOLDER --out surveys/desi-ls
Hardware: published on 20 A100, 46 hours (released code's README) or 16 H100, 48 hours (paper). Not run here.
Expected: kNN redshift R2 of 0.63 from the unaligned image embedding (paper). Not run here.

    deepspeed recipes/dinov2_vitl.py --data.path surveys/desi-ls

Where the paper and the released code differ, both are presets:

    recipe (released)  flips only, ToRGB, 250,000 steps of 1,440 images, peak rate 2.37e-4, weight decay .001 -> .01,
                       momentum .992 -> 1, half of the global crops masked
    --preset paper     rotations, z-scored bands, 625,000 steps of 1,536, peak rate .004, weight decay .001,
                       momentum .994 -> 1, every global crop masked

Two presets run on a laptop's CPU, for a first look and for tests; they are other models, not short versions of this one:

    --preset smoke     ViT of width 96 on the simulated survey: two centre crops, colours whitened; minutes
    --preset pictures  the same width on display pictures (JPEG, PNG) of 96 pixels or more; minutes

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 recipes/dinov2_vitl.py --preset smoke --device cpu \\
        --data.path runs/demo/survey
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.views.multi_crop import ASTROCLIP_PAPER, ASTROCLIP_RELEASED, MultiCrop
from armillary.engine.data.views.stretch import AsinhWhiten, ZScore
from armillary.engine.train.start import main
from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.vit.vit import ViT

EPOCH = 1_250  # steps that DINOv2 calls an epoch; schedules are published in these

RECIPE = Run(
    name="dinov2_vitl",
    method=DINOv2(
        vit=ViT(
            channels=3,
            image_size=144,
            patch_size=12,
            dim=1024,
            depth=24,
            heads=16,
            layer_scale=1e-5,
            drop_path=0.3,
        ),
        head=Head(prototypes=65_536, hidden=2048, bottleneck=256),  # shared by DINO and iBOT
        centering="softmax",
        koleo_weight=0.1,
        masked_crops=0.5,
        mask_ratio=(0.1, 0.5),
        layer_decay=0.9,
    ),
    views=ASTROCLIP_RELEASED,
    data=Data(path=Path("surveys/desi-ls"), threads=8),
    optim=Optim(lr=2e-4, lr_reference_batch=1024, clip_norm=3.0, freeze_last_layer_steps=EPOCH),
    schedule=Schedules(
        learning_rate=Cosine(end=1e-6, warmup_steps=32 * EPOCH),
        weight_decay=Cosine(start=0.001, end=0.01),
        ema_momentum=Cosine(start=0.992, end=1.0),
        teacher_temperature=Constant(0.07, warmup_steps=30 * EPOCH, warmup_start=0.04),
    ),
    # 90 images a GPU and pass divide the batch for 1, 2, 4, 8 or 16 GPUs; on the published 20, set 72.
    train=Training(steps=200 * EPOCH, global_batch=1440, micro_batch=90, precision="bf16", zero_stage=2),
    checkpoint=Checkpointing(every_steps=2_500, keep=3),
)

PAPER = replace(
    RECIPE,
    name="dinov2_vitl_paper",
    method=replace(RECIPE.method, masked_crops=1.0),
    views=replace(ASTROCLIP_PAPER, stretch=ZScore()),
    optim=replace(RECIPE.optim, lr=0.004, lr_reference_batch=None),
    schedule=replace(
        RECIPE.schedule,
        learning_rate=Cosine(end=1e-6, warmup_steps=80 * EPOCH),
        weight_decay=Constant(0.001),
        ema_momentum=Cosine(start=0.994, end=1.0),
    ),
    train=replace(RECIPE.train, steps=500 * EPOCH, global_batch=1536, micro_batch=96),
)

SMOKE = Run(
    name="dinov2_smoke",
    method=DINOv2(
        vit=ViT(channels=3, image_size=24, patch_size=4, dim=96, depth=4, heads=3, layer_scale=1.0, drop_path=0.0),
        head=Head(prototypes=1024, hidden=256, bottleneck=64, weight_norm="unit"),
        ibot_head=Head(prototypes=1024, hidden=256, bottleneck=64, weight_norm="unit"),
        separate_head=True,
        centering="sinkhorn",
        koleo_weight=0.1,
        masked_crops=0.5,
        mask_ratio=(0.1, 0.7),
        masking="random",
        layer_decay=1.0,
        patch_embed_lr=1.0,
    ),
    views=MultiCrop(
        global_size=24,
        placement="centre",
        jitter_px=3,
        quarter_turns=True,
        flux_jitter=0.5,
        sky_noise_max=0.5,
        stretch=AsinhWhiten(ridge=0.03),
    ),
    data=Data(path=Path("runs/demo/survey"), threads=1),
    optim=Optim(lr=2e-3, betas=(0.9, 0.98), clip_norm=3.0),
    schedule=Schedules(
        learning_rate=Cosine(end=2e-5, warmup_steps=60),
        weight_decay=Cosine(start=0.04, end=0.2),
        ema_momentum=Cosine(start=0.9, end=0.999),
        teacher_temperature=Constant(0.03, warmup_steps=360, warmup_start=0.04),
    ),
    train=Training(steps=1200, global_batch=32, micro_batch=16, precision="fp32", zero_stage=2),
    checkpoint=Checkpointing(every_steps=400, keep=2),
)

# Sizes and brightness carry the redshift of display pictures: wide views, and no change of flux or colour.
PICTURES = replace(
    SMOKE,
    name="dinov2_pictures",
    method=replace(SMOKE.method, vit=replace(SMOKE.method.vit, image_size=96, patch_size=12)),
    views=MultiCrop(global_size=96, placement="centre", jitter_px=3, quarter_turns=True, stretch=ZScore()),
    data=replace(SMOKE.data, path=Path("runs/demo-pictures/survey")),
)

if __name__ == "__main__":
    main(RECIPE, paper=PAPER, smoke=SMOKE, pictures=PICTURES)
