"""The methods whose steps are timed, with random inputs of their recipes' shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_training import Clock, Subject

from armillary.engine.data.loading.epoch_order import EpochOrder
from armillary.engine.token_cache.cache import CachedTokens, TokenCache, TokenLayout
from armillary.engine.token_cache.fill import TokenCacheFill
from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.models.galaxy_walker.stage2 import GalaxyWalker
from armillary.models.method import Batch, BatchKey, InputSpec, Method
from armillary.models.mmae.token_drop import TokenDropMMAE
from armillary.models.mosaic.mosaic import MOSAIC
from armillary.models.quantities import Quantity, Scaling
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining
from armillary.models.vit.vit import ViT

__all__ = [
    "CROPS",
    "MODELS",
    "SPECTRA",
    "CachedCLIP",
    "CLIPSubject",
    "DINOv2Subject",
    "GalaxyWalkerSubject",
    "MMAESubject",
    "MOSAICSubject",
    "SpecFormerSubject",
]

MODELS = {
    "vits": ViT(dim=384, depth=12, heads=6),
    "vitb": ViT(dim=768, depth=12, heads=12),
    "vitl": ViT(dim=1024, depth=24, heads=16),
}
CROPS = InputSpec(channels=3, global_size=144, n_global=2, local_size=60, n_local=8)
SPECTRA = InputSpec(pixels=7781)
PAIRS = InputSpec(channels=3, global_size=144, n_global=1, pixels=7781)
CONVERSATIONS = InputSpec(
    channels=3,
    global_size=144,
    n_global=1,
    targets=("redshift", "log_mstar"),
    target_mean=(0.1, 10.0),
    target_std=(0.05, 0.5),
    spectrum_features=1024,
    geometry_features=256,
    spaces=3,
    questions=("bar",),
    options=("strong|weak|no",),
)
HSC_DESI = InputSpec(
    channels=5,
    global_size=64,
    n_global=1,
    pixels=7783,
    wave_start_angstrom=3600.0,
    wave_step_angstrom=0.8,
    targets=("redshift",),
    target_mean=(0.5,),
    target_std=(0.4,),
)


def _quantity(name: str, size: int = 1, runs: int = 1) -> Quantity:
    levels = runs * (size > 1)
    ones = (1.0,) * (size + levels)
    scaling = Scaling("linear", tuple(0.0 for _ in ones), ones, levels=levels)
    return Quantity(name, "", tuple(map(str, range(size))), scaling=scaling, runs=runs)


SIMULATED = InputSpec(
    n_global=1,
    quantities=(
        *map(_quantity, ("redshift", "stellar_mass", "halo_mass")),
        _quantity("photometry_lsst", 6),
        _quantity("photometry_spherex", 102, 6),
        _quantity("sfh", 36, 6),
        _quantity("sed", 120, 8),
    ),
)


def _generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(index)


def _spectra(batch: Batch, size: int, pixels: int, g: torch.Generator) -> None:
    batch["spectrum"] = torch.randn(size, pixels, generator=g) + 2
    batch["spectrum_ivar"] = torch.ones(size, pixels)


class DINOv2Subject(Subject):
    """Self-distillation of crops; what teacher and student leave of forward is `heads+losses`."""

    unit = "image"
    scalars = Subject.scalars | {"ema_momentum": 0.992, "teacher_temperature": 0.05}
    ahead = "masks"
    forward = ("teacher", "student", "heads+losses")

    def __init__(self, config: DINOv2, inputs: InputSpec = CROPS) -> None:
        super().__init__(config, inputs)

    def watch(self, method: Any, clock: Clock) -> None:
        """Time both backbones."""
        clock.around(method.teacher.backbone, "heads+losses", "teacher")
        clock.around(method.student.backbone, "heads+losses", "student")

    def batch(self, index: int, size: int) -> Batch:
        """Random crops."""
        spec, g = self.inputs, _generator(index)
        crops = {"global_crops": (spec.n_global, spec.global_size), "local_crops": (spec.n_local, spec.local_size)}
        batch = Batch(position=torch.arange(size))
        for name, (n, side) in crops.items():
            batch[name] = torch.randn(n * size, spec.channels, side, side, generator=g)  # type: ignore[literal-required]
        return batch


class SpecFormerSubject(Subject):
    """Masked modelling of spectra."""

    unit = "spectrum"
    ahead = "masks"
    forward = ("windows+embed", "blocks", "head+loss")

    def __init__(self, config: SpecFormerPretraining, inputs: InputSpec = SPECTRA) -> None:
        super().__init__(config, inputs)

    def watch(self, method: Any, clock: Clock) -> None:
        """Time the embedding and, up to the last norm, the blocks."""
        clock.around(method.encoder.data_embed, "windows+embed", "windows+embed")
        clock.around(method.encoder.final_layernorm, "blocks", "blocks")

    def batch(self, index: int, size: int) -> Batch:
        """Random spectra."""
        batch = Batch(position=torch.arange(size))
        _spectra(batch, size, self.inputs.pixels, _generator(index))
        return batch


class MMAESubject(Subject):
    """Images and spectra with hidden parts."""

    unit = "pair"
    ahead = "masks"
    forward = ("bins", "encoder", "decoders+losses")

    def __init__(self, config: TokenDropMMAE, inputs: InputSpec = HSC_DESI) -> None:
        super().__init__(config, inputs)

    def watch(self, method: Any, clock: Clock) -> None:
        """Time the encoder."""
        clock.around(method.encoder, "bins", "encoder")

    def batch(self, index: int, size: int) -> Batch:
        """Random pairs with redshifts."""
        spec, g = self.inputs, _generator(index)
        batch = Batch(position=torch.arange(size), targets=torch.rand(size, 1, generator=g))
        batch["crop"] = torch.randn(size, spec.channels, spec.global_size, spec.global_size, generator=g)
        _spectra(batch, size, spec.pixels, g)
        return batch


class GalaxyWalkerSubject(Subject):
    """Stage 2 on the tiny random model, whose tokens are bytes."""

    unit = "galaxy"
    ahead = "prompts"
    forward = ("tokens", "model", "heads+losses")

    def __init__(self, inputs: InputSpec = CONVERSATIONS) -> None:
        super().__init__(GalaxyWalker(adapter=GeometryAdapter(every=2), image_side=112), inputs)

    def watch(self, method: Any, clock: Clock) -> None:
        """Time the model, image encoder and all."""
        clock.around(method.reader.vlm.model.language_model, "tokens", "model")

    def batch(self, index: int, size: int) -> Batch:
        """Random galaxies; each is asked for a property or for its bar."""
        spec, g = self.inputs, _generator(index)
        batch = Batch(position=torch.arange(size), targets=torch.randn(size, len(spec.targets), generator=g))
        batch["crop"] = torch.rand(size, spec.channels, spec.global_size, spec.global_size, generator=g)
        batch["spectrum_vector"] = torch.randn(size, spec.spectrum_features, generator=g)
        batch["geometry_vectors"] = torch.randn(size, spec.spaces, spec.geometry_features, generator=g)
        batch["answers"] = torch.randint(0, 3, (size, 1), generator=g)
        return batch


class MOSAICSubject(Subject):
    """Quantities, of which some are hidden."""

    unit = "galaxy"
    ahead = "masks"
    forward = ("embed", "blocks", "heads+losses")

    def __init__(self, config: MOSAIC, inputs: InputSpec = SIMULATED) -> None:
        super().__init__(config, inputs)

    def watch(self, method: Any, clock: Clock) -> None:
        """Time the embeddings and, up to the last norm, the blocks."""
        clock.around(method.network.embeddings[-1], "embed", "embed")
        clock.around(method.network.norm, "blocks", "blocks")

    def batch(self, index: int, size: int) -> Batch:
        """Random entries and errors."""
        g, entries = _generator(index), sum(q.scaling.entries for q in self.inputs.quantities)
        return Batch(
            position=torch.arange(size),
            quantities=torch.randn(size, entries, generator=g),
            quantity_errors=torch.rand(size, entries, generator=g),
        )


class CLIPSubject(Subject):
    """Alignment of images and spectra; frozen encoders run in every step."""

    unit = "pair"
    ahead = "read"
    forward = ("image encoder", "spectrum encoder", "pooling+heads", "loss")

    def __init__(self, image: ViT, spectrum: SpecFormer, inputs: InputSpec = PAIRS, **settings: Any) -> None:
        nowhere = Path("random-weights")  # a file is asked for by frozen encoders, and read by the trainer alone
        config = AstroCLIP(
            image=replace(image, drop_path=0.0),
            spectrum=spectrum,
            image_from=nowhere,
            spectrum_from=nowhere,
            **settings,
        )
        super().__init__(config, inputs)

    def watch(self, method: Any, clock: Clock) -> None:
        """Time both encoders and both heads."""
        clock.around(method.image_encoder.backbone, "pooling+heads", "image encoder")
        clock.around(method.spectrum_encoder.backbone, "spectrum encoder", "spectrum encoder")
        for head in (method.image_encoder, method.spectrum_encoder):
            clock.around(head, "pooling+heads", "pooling+heads")

    def batch(self, index: int, size: int) -> Batch:
        """Random pairs; the row names the pair."""
        spec, g = self.inputs, _generator(index)
        batch = Batch(position=torch.arange(size), row=torch.arange(index * size, (index + 1) * size))
        batch["crop"] = torch.rand(size, spec.channels, spec.global_size, spec.global_size, generator=g)
        _spectra(batch, size, spec.pixels, g)
        return batch


class CachedCLIP(Subject):
    """The same on tokens read from a token cache on disk, in each step before it and not ahead of it.

    Args:
        recomputed: The subject whose tokens these are.
        folder: Where the cache is filled; the files are then in the page cache.
        batches: Batches that it holds; later ones repeat them.
        size: Pairs a batch.
        dtype: Of the files.
        threads: Threads that read.
    """

    unit = CLIPSubject.unit
    ahead = CLIPSubject.ahead
    forward = CLIPSubject.forward

    def __init__(
        self, recomputed: CLIPSubject, folder: Path, batches: int, size: int, dtype: str = "float16", threads: int = 2
    ) -> None:
        super().__init__(recomputed.config, recomputed.inputs)
        self._recomputed, self._folder, self._dtype, self._threads = recomputed, folder, dtype, threads
        self._batches, self._plan = batches, EpochOrder((batches * size,), (0,))
        self._transform: CachedTokens | None = None
        self.gigabytes_per_pair = 0.0

    def watch(self, method: Any, clock: Clock) -> None:
        """As where they are computed; the encoders do not run."""
        self._recomputed.watch(method, clock)

    def batch(self, index: int, size: int) -> Batch:
        """Rows of pairs."""
        rows = torch.arange(size) + index % self._batches * size
        return Batch(position=torch.arange(size), row=rows)

    def prepared(self, method: Method, batch: Batch, index: int, device: torch.device) -> Batch:
        """The batch with its tokens, read and checked."""
        assert self._transform is not None
        return self._transform(batch, BatchKey(0, 0, 0, len(batch["row"])))

    def settle(self, method: Any, device: torch.device, size: int) -> None:
        """Fill the cache."""

        def tokens(index: int) -> dict[str, Any]:
            batch = self._recomputed.batch(index, size)
            on_device = Batch(**{name: x.to(device) for name, x in batch.items()})  # type: ignore[typeddict-item, attr-defined]
            return {name: x.float().cpu().numpy() for name, x in method.tokens(on_device).items()}

        shapes = {name: x.shape[1:] for name, x in tokens(0).items()}
        layout = TokenLayout(self._plan.samples, self._dtype, shapes)
        self.gigabytes_per_pair = sum(map(layout.row_bytes, layout.names)) / 1e9
        fill = TokenCacheFill(self._folder, layout, {})
        with fill.prepared():
            made = {index: tokens(index) for index in range(self._batches)}
            for number, chunk in enumerate(fill.chunks):
                rows = ((i, {k: x[i % size][None] for k, x in made[i // size].items()}) for i in chunk)
                fill.write(number, rows)
            fill.finish()
        dtype = next(p.dtype for p in method.parameters() if p.requires_grad)
        self._transform = CachedTokens(TokenCache(self._folder, self._plan), device, dtype, self._threads)
