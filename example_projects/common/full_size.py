"""Which of the paper's numbers belong beside a comparison's, and in what the comparison differs."""

from __future__ import annotations

import argparse

from example_projects.common.image_command import parser_of
from example_projects.common.image_project import NOT_OF_A_RUN, ImageProject
from example_projects.common.paper import Numbers

# Options of a run that are no part of its training, and the data, which the note names by themselves.
APART = {"setting", "data_dir", "test_dir", "feature_extractor", "weights", "metrics_every"}
LEFT_OUT = {"perceptual_weights": "torchvision's VGG19"}  # what an option means that was not given; else: all


def numbers_for(project: ImageProject, options: argparse.Namespace) -> Numbers:
    """The paper's numbers for what the options ask for, by method and column.

    On the balanced losses the paper has Adam alone. Of several data sets the columns carry their names. Methods whose
    lambdas are others in the paper have no numbers.
    """
    others = project.not_the_papers.get(options.setting, ((), ""))[0]
    names = project.data_sets(options)
    found: Numbers = {}
    for name in names:
        prefix = f"{name} " if len(names) > 1 else ""
        for method, metrics in project.paper.get(name.lower(), {}).items():
            if method in others:
                continue
            columns = {prefix + project.paper_columns.get(metric, metric): value for metric, value in metrics.items()}
            found[method] = {**found.get(method, {}), **columns}
    if options.setting.startswith("balanced") and "balanced-adam" in found:
        return dict.fromkeys(("adam", "balanced-adam"), found["balanced-adam"])
    return found


def departures(project: ImageProject, options: argparse.Namespace) -> list[str]:
    """The options that change a run and are not as the paper's numbers have them, in words."""
    full = parser_of(project).parse_args([])
    vars(full).update(project.full_size)
    names = [name for name in vars(full) if name not in (NOT_OF_A_RUN | APART) - {"lr"}]
    return [
        f"{name.replace('_', ' ')} {in_words(name, options)} in place of {in_words(name, full)}"
        for name in names
        if getattr(options, name) != getattr(full, name)
    ]


def in_words(name: str, options: argparse.Namespace) -> str:
    """The value of an option.

    Example:
        >>> in_words("lr", argparse.Namespace(lr=[0.001, 0.01])), in_words("blocks", argparse.Namespace(blocks=None))
        ('0.001, 0.01', 'all')
    """
    value = getattr(options, name)
    if value is None:
        return LEFT_OUT.get(name, "all")
    return ", ".join(f"{one:g}" for one in value) if isinstance(value, list) else str(value)


def note_on(project: ImageProject, options: argparse.Namespace, paper: Numbers) -> str:
    """What the reader of the paper's numbers must know."""
    if not paper:
        return "The paper's numbers for these images are not known here, so they are not beside ours."
    others, reason = project.not_the_papers.get(options.setting, ((), ""))
    differing = departures(project, options)
    parts = [
        "The paper's numbers are of runs at full size, on the whole data set and with the originals' options.",
        f"These runs differ in: {'; '.join(differing)}." if differing else "These runs have the same options.",
        project.size_note,
        reason if set(others) & set(options.method) else "",
        f"Data: {project.make_data(options, options.seeds[0]).announcement}",
    ]
    return " ".join(part for part in parts if part)
