"""What TensorBoard shows beyond scalars: pictures, a layout of charts, and what a tag means."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_mtadam.callbacks import tags

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from PIL.Image import Image


def writers(loggers: Sequence[Logger]) -> Iterator[Any]:
    """The TensorBoard writers behind the loggers, whatever the loggers' classes."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # tensorboard is not installed, so no logger writes with it
        return
    for logger in loggers:
        if isinstance(writer := getattr(logger, "experiment", None), SummaryWriter):
            yield writer


def add_picture(writer: Any, tag: str, picture: Image, step: int) -> None:
    """Write a picture."""
    import numpy as np

    writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")


def explain(writer: Any, terms_of: Mapping[str, Sequence[str]], logged: Container[str]) -> None:
    """Say what all tags mean, and lay out the charts.

    Args:
        writer: TensorBoard's.
        terms_of: the terms, by the prefix of their tags.
        logged: the tags of what else is logged, of which the module's losses are described too.
    """
    scalars, pictures = dict[str, str](), dict[str, str]()
    for prefix, terms in terms_of.items():
        scalars |= tags.meanings_of_scalars(prefix, terms)
        pictures |= tags.meanings_of_pictures(prefix)
        losses = {f"train/{term}": f"The loss **{term}**, as the training step returned it." for term in terms}
        scalars |= {tag: text for tag, text in losses.items() if tag in logged}
    add_layout(writer, terms_of)
    describe(writer, scalars, pictures)


def add_layout(writer: Any, terms_of: Mapping[str, Sequence[str]]) -> None:
    """Lay out one chart per term: the median over the layers between the 10th and the 90th percentile.

    The weights of losses share a chart. A writer keeps one layout, the last.
    """
    charts = {prefix: _charts(prefix, terms) for prefix, terms in terms_of.items()}
    writer.add_custom_scalars(charts)


def _charts(prefix: str, terms: Sequence[str]) -> dict[str, list[Any]]:
    if prefix == tags.TERM_WEIGHT:
        return {"all terms": ["Multiline", [f"{prefix}/.+"]]}
    names = ("median", "p10", "p90")
    return {
        term: ["Margin", [tags.summary(prefix, term, name) for name in names]]
        for term in reversed(terms)  # TensorBoard shows the last one first
    }


def describe(writer: Any, scalars: Mapping[str, str], pictures: Mapping[str, str]) -> None:
    """Say what tags mean, in Markdown, before the first value of each. TensorBoard shows it beside them.

    It takes a description without a value, if it is told of what class the values will be. Something must have been
    written before: that opens the file of a writer that was closed at the end of an earlier run.
    """
    from tensorboard.compat.proto import summary_pb2 as proto  # type: ignore[import-untyped]

    values = []
    for plugin, data_class, meanings in (
        ("scalars", proto.DATA_CLASS_SCALAR, scalars),
        ("images", proto.DATA_CLASS_BLOB_SEQUENCE, pictures),
    ):
        for tag, text in meanings.items():
            metadata = proto.SummaryMetadata(summary_description=text, data_class=data_class)
            metadata.plugin_data.plugin_name = plugin
            values.append(proto.Summary.Value(tag=tag, metadata=metadata))
    writer.file_writer.add_summary(proto.Summary(value=values))
