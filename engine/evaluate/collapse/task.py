"""The task "collapse": has the first run's encoder collapsed?"""

from __future__ import annotations

from armillary.engine.config.provenance import survey_fingerprint
from armillary.engine.evaluate.collapse.measures import assess
from armillary.engine.evaluate.study.study import Measure, Outcome, Study
from armillary.models.dinov2.collapse import MIN_EFFECTIVE_RANK

__all__ = ["collapse"]

SAMPLES = 10_000


def collapse(study: Study) -> Outcome:
    """Measure the first feature set's effective rank and repeats, and the prototypes that were in use in training.

    Args:
        study: Embeddings, and the log of their run.

    Raises:
        ValueError: The first feature set holds predictions: of one to five numbers, no rank follows.
    """
    first = next(iter(study.features.values()))
    if first.targets:
        raise ValueError(f"{first.name} are predictions, not embeddings")
    log = study.log
    c = assess(
        study.vectors(first.name, study.shown(first.name)[1])[:SAMPLES],
        prototypes_in_use=log.last("prototypes_in_use"),
        prototypes=log.prototypes(),
        window_rows=log.last("window_rows"),
    )
    found = {"effective_rank": c.effective_rank, "dimensions": c.dimensions, "duplicates": c.duplicates}
    if c.prototypes_in_use is not None and c.prototypes:
        found |= {"prototypes_in_use": c.prototypes_in_use, "prototypes": c.prototypes}
    measures = tuple(
        Measure("collapse", first.name, "", "", name, float(value), samples=c.samples) for name, value in found.items()
    )
    in_training = log.last("effective_rank")
    by_rank_alone = len(c.reasons) == 1 and c.effective_rank <= MIN_EFFECTIVE_RANK
    foreign = log.record.get("survey") not in (None, survey_fingerprint(study.survey))
    if foreign and by_rank_alone and in_training is not None and in_training > MIN_EFFECTIVE_RANK:
        narrow = f"effective rank {c.effective_rank:.1f} over {c.samples:,} embeddings of this survey, {in_training:.1f} in training"
        text = (
            f"E{narrow[1:]}: the encoder tells objects apart, but these are too alike to show more of it, or too few."
        )
        return Outcome(
            "collapse", measures, ("not collapsed, but narrow: " + narrow,), verdict=(("note", "Narrow", text),)
        )
    if c.collapsed:
        reasons = "; ".join(c.reasons)
        verdict = ("no", "Collapsed", reasons + ".")
        return Outcome("collapse", measures, ("collapsed: " + reasons,), verdict=(verdict,), collapsed=True)
    use = ""
    if c.prototypes_in_use is not None and c.prototypes:
        use = f" {c.prototypes_in_use:.0f} of {c.prototypes:.0f} prototypes are in use."
    twins = "no two embeddings are equal" if not c.duplicates else f"{c.duplicates} are duplicates"
    rank = f"ffective rank {c.effective_rank:.1f} of {c.dimensions}"
    verdict = ("yes", "No collapse", f"E{rank} over {c.samples:,} embeddings; {twins}.{use}")
    return Outcome("collapse", measures, (f"no collapse: e{rank}",), verdict=(verdict,))
