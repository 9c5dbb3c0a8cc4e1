"""Which of the paper's numbers belong beside a comparison's, and what the comparison has less of."""

from __future__ import annotations

import argparse

from example_projects.common.image_command import parser_of
from example_projects.common.image_project import ImageProject
from example_projects.common.paper import Numbers

# Options whose defaults are the size that the paper's numbers are of.
SIZE = ("image_size", "width", "blocks", "batch_size", "max_epochs", "limit_train_batches", "limit_test_batches")


def numbers_for(project: ImageProject, options: argparse.Namespace) -> Numbers:
    """The paper's numbers for what the options ask for, by method and column.

    On the balanced losses the paper has Adam alone. Of several data sets the columns carry their names.
    """
    names = project.data_sets(options)
    found: Numbers = {}
    for name in names:
        prefix = f"{name} " if len(names) > 1 else ""
        for method, metrics in project.paper.get(name.lower(), {}).items():
            columns = {prefix + project.paper_columns.get(metric, metric): value for metric, value in metrics.items()}
            found[method] = {**found.get(method, {}), **columns}
    if options.setting.startswith("balanced") and "balanced-adam" in found:
        return dict.fromkeys(("adam", "balanced-adam"), found["balanced-adam"])
    return found


def departures(project: ImageProject, options: argparse.Namespace) -> list[str]:
    """What is not as large as in the paper, in words."""
    full = parser_of(project).parse_args([])
    return [
        f"{name.replace('_', ' ')} {getattr(options, name)} in place of {getattr(full, name) or 'all'}"
        for name in SIZE
        if hasattr(full, name) and getattr(options, name) != getattr(full, name)
    ]


def note_on(project: ImageProject, options: argparse.Namespace, paper: Numbers) -> str:
    """What the reader of the paper's numbers must know."""
    if not paper:
        return "The paper's numbers for these images are not known here, so they are not beside ours."
    data = project.make_data(options, options.seeds[0]).announcement
    rate = f"the learning rate of the original, {parser_of(project).get_default('lr')[0]:g}"
    smaller = departures(project, options)
    here = f"of another size: {'; '.join(smaller)}" if smaller else "of that size but for the data"
    return (
        f"The paper's numbers are of runs at full size, on the whole data set and at {rate}. These runs are {here}."
        f" Data: {data}"
    )
