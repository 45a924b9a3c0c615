"""A task of an evaluation: how strongly does the first embedding follow the redshift?"""

from collections.abc import Sequence

import numpy as np

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page import html
from armillary.engine.evaluate.runs.tasks import TASKS, Task
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import Measure, Outcome, Study
from armillary.models.method import Method


class Correlation(Task):
    """The largest correlation of a dimension with the redshift."""

    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        return "" if "redshift" in survey.labels else "the survey has no redshifts"

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        name = next(iter(study.features))
        rows = study.rows(study.test_split, name)
        z, x = study.label("redshift", rows), study.vectors(name, rows)
        x = x[:, x.std(0) > 0]
        best = max(abs(np.corrcoef(column, z)[0, 1]) for column in x.T)
        measure = Measure("correlation", name, "redshift", "", "correlation", best, samples=len(rows))
        page = html.section("Correlation with the redshift", "", html.card(f"{best:.3f}"))
        return Outcome("correlation", (measure,), (f"largest correlation {best:.3f}",), (page,))


TASKS["correlation"] = Correlation()
