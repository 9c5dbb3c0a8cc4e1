"""Lightning's private attributes are where lightning_internals.py looks for them, and mean what it takes them to mean.

A test here that fails with "Lightning has moved ..." says which attribute to look for in the new release.
"""

import ast
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import wrappers
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.strategies import DDPStrategy

from lightning_mtadam import lightning_internals
from tests.lightning_models import (
    QUIET,
    MemoryLogger,
    Regression,
    SumRegression,
    assert_same,
    fit,
    make_loader,
    make_network,
    make_trainer,
    sgd,
)

pytestmark = QUIET


def require(owner, path):
    """The attribute at a dotted path, or a failure that names the first part that is gone."""
    name = type(owner).__name__
    for part in path.split("."):
        assert hasattr(owner, part), f"Lightning has moved {name}.{part}: adapt lightning_mtadam/lightning_internals.py"
        owner, name = getattr(owner, part), f"{name}.{part}"
    return owner


def test_set_result_reader_makes_the_result_of_every_automatic_training_step():
    read, module = [], SumRegression(sgd)

    def reader(output, accumulated):
        read.append((output.item(), accumulated))
        return ClosureResult.from_training_step_output(output * 0, accumulated)

    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=2)
    loop = require(trainer, "fit_loop.epoch_loop.automatic_optimization")
    require(loop, "output_result_cls.from_training_step_output")
    lightning_internals.set_result_reader(trainer, reader)
    trainer.fit(module, make_loader(4))
    assert [accumulated for _, accumulated in read] == [2, 2, 2, 2]
    assert all(value > 0 for value, _ in read)
    assert_same(module.network, make_network())  # the loop went on with a loss of zero


def test_set_result_reader_leaves_other_trainers_alone():
    lightning_internals.set_result_reader(make_trainer(), lambda output, accumulated: pytest.fail("read"))
    loop = make_trainer().fit_loop.epoch_loop.automatic_optimization
    assert loop.output_result_cls is ClosureResult


@pytest.mark.parametrize("skip", [False, True])
def test_skips_backward_tells_whether_lightning_will_run_backward(skip):
    class Skipping(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            require(trainer, "fit_loop._skip_backward")  # what stochastic weight averaging sets
            require(trainer, "fit_loop.epoch_loop.automatic_optimization._skip_backward")
            trainer.fit_loop._skip_backward = skip

    class Watching(SumRegression):
        told, backwards = (), 0

        def training_step(self, batch, batch_idx):
            self.told += (lightning_internals.skips_backward(self.trainer),)
            return super().training_step(batch, batch_idx)

        def backward(self, loss, *args, **kwargs):
            self.backwards += 1
            super().backward(loss, *args, **kwargs)

    module = Watching(sgd)
    # Accumulating over the whole epoch: without gradients there is nothing to step on.
    fit(module, make_loader(3), max_epochs=1, accumulate_grad_batches=3, callbacks=[Skipping()])
    assert module.told == (skip,) * 3
    assert module.backwards == (0 if skip else 3)


def test_numbers_logged_beside_are_read_with_what_was_logged():
    class Beside(SumRegression):
        def on_train_start(self):
            trainer = self.trainer
            require(trainer, "fit_loop.epoch_loop.val_loop._results")
            require(trainer, "fit_loop.epoch_loop._results.metrics")
            require(trainer, "fit_loop.epoch_loop._results.reset")
            self.beside = lightning_internals.LogBeside(trainer)

        def training_step(self, batch, batch_idx):
            self.beside.add(("a", "b"), torch.tensor([1.0 + batch_idx, 5.0]), on_bar={"a": "short"})
            assert float(self.trainer.callback_metrics["a"]) == 1 + batch_idx, "though nothing else was logged"
            if batch_idx == 2:
                self.log("b", 7.0)
            return super().training_step(batch, batch_idx)

    logger = MemoryLogger()
    trainer = fit(Beside(sgd), make_loader(3), max_epochs=2, logger=logger, log_every_n_steps=1)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found == {"a": 3, "b": 7, "a_epoch": 2}
    assert trainer.progress_bar_metrics == {"short": 3}
    batches = [{tag: value for tag, value in row.items() if tag in "ab"} for _, row in logger.rows if "a" in row]
    one, two, three = {"a": 1, "b": 5}, {"a": 2, "b": 5}, {"a": 3, "b": 7}
    assert batches == [one, two, three, {"a": 1}, {"a": 2}, three], "a tag that was logged once is not taken back"
    assert [row["a_epoch"] for _, row in logger.rows if "a_epoch" in row] == [2, 2]


def test_an_accelerator_is_waited_for_where_the_trainer_logs_only():
    """On the device "meta" a number cannot be read at all."""
    shown = []

    class Beside(SumRegression):
        def on_train_start(self):
            self.beside = lightning_internals.LogBeside(self.trainer)

        def training_step(self, batch, batch_idx):
            self.beside.add(("a",), torch.ones(1, device="meta"), on_bar={"a": "a"})
            shown.append(bool(self.beside._bar))
            self.beside._forget()
            return super().training_step(batch, batch_idx)

    fit(Beside(sgd), make_loader(6), max_epochs=1, log_every_n_steps=3)
    assert shown == [False, False, True] * 2


def test_unwrap_gives_the_optimizer_that_lightning_wrapped():
    class Manual(SumRegression):
        def training_step(self, batch, batch_idx):
            wrapped = self.optimizers()
            assert isinstance(wrapped, LightningOptimizer)
            require(wrapped, "optimizer")
            assert lightning_internals.unwrap(wrapped) is self.trainer.optimizers[0]
            self.unwrapped = True

    module = Manual(sgd)
    module.automatic_optimization = False
    fit(module, make_loader(1), max_epochs=1)
    assert module.unwrapped


def test_unwrap_gives_back_a_bare_optimizer():
    optimizer = sgd(make_network())
    assert lightning_internals.unwrap(optimizer) is optimizer


class LogTimes(pl.Callback):
    """At which batches, and under which steps, lightning_internals would log."""

    def __init__(self):
        self.batches, self.steps, self.steps_at_epoch_ends = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        require(trainer, "_logger_connector.should_update_logs")
        require(trainer, "fit_loop._should_accumulate")
        require(trainer, "fit_loop.epoch_loop._batches_that_stepped")
        if lightning_internals.should_log(trainer):
            self.batches.append(trainer.current_epoch * trainer.num_training_batches + batch_idx)
            self.steps.append(lightning_internals.logging_step(trainer))

    def on_train_epoch_end(self, trainer, pl_module):
        self.steps_at_epoch_ends.append(lightning_internals.logging_step(trainer))


def steps_of_batches(logger):
    """The steps at which batches were logged, not ends of epochs."""
    return [step for step, row in logger.rows if "train/loss" in row]


@pytest.mark.parametrize(
    ("accumulate", "every", "batches"),
    [(1, 1, list(range(10))), (1, 3, [2, 5, 8]), (2, 1, [1, 3, 4, 6, 8, 9]), (2, 2, [3, 6, 9]), (5, 1, [4, 9])],
)
def test_should_log_and_logging_step_follow_lightnings_own_logging(accumulate, every, batches):
    times, logger = LogTimes(), MemoryLogger()
    options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": every}
    fit(Regression(), make_loader(5), logger=logger, callbacks=[times], **options)
    assert times.batches == batches
    assert times.steps == steps_of_batches(logger)
    steps = -(-5 // accumulate)
    assert times.steps_at_epoch_ends == [steps, 2 * steps]  # one more than the last batch's


def test_logging_step_goes_on_after_a_resume(tmp_path):
    first, second, logger = LogTimes(), LogTimes(), MemoryLogger()
    fit(Regression(), make_loader(5), callbacks=[first], log_every_n_steps=1).save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(max_epochs=4, callbacks=[second], logger=logger, log_every_n_steps=1)
    trainer.fit(Regression(), make_loader(5), ckpt_path=tmp_path / "last.ckpt")
    assert first.steps == list(range(10))
    assert second.steps == list(range(10, 20)) == steps_of_batches(logger)


def test_should_log_is_false_where_logging_is_off():
    times = LogTimes()
    fit(Regression(), make_loader(5), callbacks=[times], log_every_n_steps=0)
    assert times.batches == []


def test_lightning_still_keeps_the_communication_hook_where_it_is_looked_for():
    require(DDPStrategy(), "_ddp_comm_hook")


ROOT = Path(__file__).parents[1]
# Not Lightning's: torch's multi-tensor functions and fused optimizers, its compiler, the hooks of its
# DistributedDataParallel and of its tensors, its graphs, and what nn.Module.to() and its like go through; and what
# every named tuple has.
OF_OTHERS = re.compile(
    r"_foreach_\w+|_fused_adamw_|_dynamo|_comm_hooks|_join_config|_apply|_version|_replace|_make"
    r"|_C|_current_graph_task_id|_forward_cls|_post_accumulate_grad_hooks"
    r"|_backward_hooks|_step_supports_amp_scaling|_orig_mod"
)


def test_a_module_still_keeps_its_trainer_where_it_is_looked_for():
    module = Regression()
    require(module, "_trainer")
    assert not lightning_internals.has_trainer(module)
    fit(module, make_loader(1), fast_dev_run=True)
    assert lightning_internals.has_trainer(module)


def test_fabric_still_notes_its_backward_passes_where_they_are_noted():
    require(wrappers, "_in_fabric_backward")
    with lightning_internals.as_fabric_backward():
        assert wrappers._in_fabric_backward
    assert not wrappers._in_fabric_backward


def test_trainers_still_ask_what_a_model_is_that_is_no_module_of_theirs(monkeypatch):
    from lightning.pytorch.utilities import compile

    require(compile, "_check_mixed_imports")
    monkeypatch.setattr(compile, "_check_mixed_imports", lambda model: None)  # as if nobody had asked before
    asked, network = [], make_network()
    lightning_internals.ask_first(asked.append)
    lightning_internals.ask_first(asked.append)  # but once
    for model in (network, torch.compile(network)):
        with pytest.raises((TypeError, ValueError), match="LightningModule"):
            make_trainer().fit(model, make_loader())
    assert asked == [network] * 2


def private_attributes(file):
    """The private attributes, by name and line, that a file uses of other objects than its own class's."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            name = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = str(getattr(node.args[1], "value", ""))
        else:
            continue
        if re.match(r"_[^_]", name) and not OF_OTHERS.fullmatch(name):
            yield name, node.lineno


def test_no_other_file_uses_a_private_attribute_of_lightning():
    files = [file for folder in ("lightning_mtadam", "example_projects") for file in (ROOT / folder).rglob("*.py")]
    files.remove(ROOT / "lightning_mtadam" / "lightning_internals.py")
    assert len(files) > 20
    found = [f"{file.relative_to(ROOT)}:{line}: {name}" for file in files for name, line in private_attributes(file)]
    assert not found, "move these to lightning_mtadam/lightning_internals.py"


def test_every_private_attribute_is_required_by_name_here():
    used = {name for name, _ in private_attributes(ROOT / "lightning_mtadam" / "lightning_internals.py")}
    assert {"_skip_backward", "_ddp_comm_hook"} <= used
    required = re.findall(r'require\([\w()]+, "([\w.]+)"\)', Path(__file__).read_text())
    assert used <= {part for path in required for part in path.split(".")}
