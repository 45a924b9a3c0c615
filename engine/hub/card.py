"""The model card: what a stranger on the hub has to know before using an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from armillary import __version__
from armillary.engine.weights.trained_encoder import TrainedEncoder

__all__ = ["model_card"]

_CARD = """\
---
library_name: transformers
{%- if licence %}
license: {{ licence }}
{%- endif %}
tags: [astronomy, galaxies, {{ method }}]
{%- if image %}
pipeline_tag: image-feature-extraction
{%- endif %}
---

# {{ name }}

{{ method }}, trained on {{ survey.name }} for {{ "{:,}".format(step) }} steps by Armillary {{ version }}
(commit {{ commit }}).

## Use

```python
from transformers import AutoModel{{ ", AutoImageProcessor" if image }}

model = AutoModel.from_pretrained("REPO"{{ ", trust_remote_code=True" if remote }}).eval()
{%- if image %}
processor = AutoImageProcessor.from_pretrained("REPO", trust_remote_code=True)
pixels = processor(fluxes)["pixel_values"]  # [B, {{ survey.bands | length }}, H, W] in {{ survey.unit }}, bands {{ survey.bands | join(", ") }}
{%- endif %}
{%- if opens == "SpecFormerModel" %}
embedding = model(spectrum, ivar).pooler_output  # [B, {{ survey.spectrum.grid.count }}] in {{ survey.spectrum.unit }}
{%- elif opens == "AstroCLIPModel" %}
found = model(pixel_values=pixels, spectrum=spectrum, ivar=ivar)  # found.image_embeds, found.spectrum_embeds
{%- else %}
embedding = model(pixel_values=pixels).pooler_output
{%- endif %}
```

{% if image -%}
Images: cutouts of at least {{ side }} x {{ side }} pixels
{%- if survey.pixel_scale_arcsec %} of {{ "%.3g" | format(survey.pixel_scale_arcsec) }} arcsec{% endif %}; the processor cuts out the centre, \
takes pixels without data for blank sky, and stretches with the numbers of the training survey.
{% endif -%}
{% if survey.spectrum and opens != "Dinov2Model" and opens != "Dinov2WithRegistersModel" -%}
Spectra: {{ survey.spectrum.grid.count }} pixels from {{ "%.1f" | format(wave[0]) }} to {{ "%.1f" | format(wave[-1]) }} angstrom (vacuum; `model.config` lists \
all wavelengths), flux in {{ survey.spectrum.unit }}, inverse variance 0 where a pixel carries no data.
{% endif %}
## Training data

Survey "{{ survey.name }}"{% if survey.statistics.samples %}, statistics of {{ "{:,}".format(survey.statistics.samples) }} training samples{% endif %}.
The licence of these data is not recorded; the publisher has to name it here.

## Figures
{% if figures %}
From the evaluation of this run, on its test split:

| task | features | target | model | metric | value |
|---|---|---|---|---|---|
{% for f in figures -%}
| {{ f.task }} | {{ f.features }} | {{ f.target }} | {{ f.model }} | {{ f.metric }} | {{ "%.4g" | format(f.value) }}{% if f.error %} +- {{ "%.2g" | format(f.error) }}{% endif %} |
{% endfor -%}
{% else %}
None were measured when this folder was written (`armillary evaluate RUN`).
{% endif %}
## Limits

Embeddings are of galaxies as this survey shows them: other seeing, depth, bands or pixel sizes move them. Nothing was done
about selection effects of the training sample. {% if not licence %}No licence was given for the weights.{% endif %}
"""

MOST = 40
"""Figures in a card."""


def model_card(source: TrainedEncoder, opens: str, *, remote: bool, licence: str, figures: Path | None) -> str:
    """The card as Markdown with the hub's header.

    Args:
        source: The encoder.
        opens: Class that opens it.
        remote: Whether that is remote code.
        licence: As the hub calls it; none where empty.
        figures: metrics.parquet of an evaluation.

    Raises:
        ValueError: The file of figures is not one of an evaluation.
    """
    survey = source.pixels
    wave = None if survey.spectrum is None else survey.spectrum.grid.angstrom()
    return (
        jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        .from_string(_CARD)
        .render(
            name=source.run.name,
            method=type(source.run.method).__name__,
            survey=survey,
            step=source.record["step"],
            version=__version__,
            commit=source.record.get("commit") or "unknown",
            image=bool(source.inputs.channels),
            side=source.inputs.global_size,
            wave=wave,
            opens=opens,
            remote=remote,
            licence=licence,
            figures=[] if figures is None else _figures(figures),
        )
    )


def _figures(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        return [row for row in rows if row["value"] is not None and row["stratum"] == "all"][:MOST]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not the metrics.parquet of an evaluation: {error!r}") from error
