"""What a packed survey holds, as a table for the screen."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from armillary.engine.data.format.survey import Survey

__all__ = ["summary"]


def summary(survey: Survey) -> Table:
    """A table of what a survey holds."""
    table = Table("", "value", title=f"survey {survey.name}", show_header=False)
    splits = Counter[str]()
    for shard in survey.shards:
        splits[shard.split] += shard.count
    size = sum(s.bytes for s in survey.shards)
    scale = "unknown scale" if survey.pixel_scale_arcsec is None else f"{survey.pixel_scale_arcsec:g} arcsec a pixel"
    table.add_row("samples", ", ".join(f"{n:,} {split}" for split, n in splits.items()))
    if survey.bands:
        images = f"{' '.join(survey.bands)}, {survey.width} x {survey.height} pixels, {scale}, {survey.unit}"
        table.add_row("images", images)
    if survey.spectrum is not None:
        wave = survey.spectrum.grid.angstrom()
        table.add_row(
            "spectra", f"{len(wave):,} pixels, {wave[0]:,.1f} to {wave[-1]:,.1f} angstrom, {survey.spectrum.unit}"
        )
    for vector in survey.vectors:
        table.add_row(vector.name, ", ".join(filter(None, (f"{vector.size} components", vector.unit))))
    table.add_row(
        "shards",
        f"{len(survey.shards)}, {size / 2**20:,.1f} MiB, {size / 1024 / max(survey.count(), 1):,.1f} KiB a sample",
    )
    table.add_row("codec", f"{survey.codec}{f', steps {_numbers(survey.step)}' if survey.step else ''}")
    if survey.bands:
        table.add_row("sky sigma", _numbers(survey.sky_sigma))
        table.add_row("mean", _numbers(survey.statistics.mean))
        table.add_row("std", _numbers(survey.statistics.std))
    table.add_row("labels", "\n".join(f"{k}: {v}" for k, v in survey.labels.items()) or "none")
    skipped = survey.provenance.get("skipped", {}).get("count", 0)
    if skipped:
        table.add_row("skipped", f"{skipped} unusable samples were left out")
    return table


def _numbers(values: tuple[float, ...]) -> str:
    return "  ".join(f"{v:.4g}" for v in values)
