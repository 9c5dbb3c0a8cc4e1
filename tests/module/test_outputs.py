"""Other optimizers than MTAdam, and other outputs than several losses, train as in every LightningModule."""

import pytest

from tests.lightning_models import (
    QUIET,
    Regression,
    SumRegression,
    adam,
    assert_same,
    fit,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    sgd,
    three_losses,
    total,
)
from tests.loops import by_hand, take_step
from tests.module.recorder import Recorder

pytestmark = QUIET


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [None, (0.1, "norm"), (0.1, "value")])
@pytest.mark.parametrize("make_optimizer", [adam, sgd])
def test_another_optimizer_trains_on_the_plain_sum(make_optimizer, clip, accumulate):
    module = Regression(make_optimizer)
    limit, algorithm = clip or (None, None)
    fit(
        module,
        make_loader(),
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
        accumulate_grad_batches=accumulate,
    )
    assert_same(module.network, by_hand(make_optimizer, clip=clip, accumulate=accumulate)[0])
    assert module._pending is None


def test_another_optimizer_differentiates_once_per_step():
    class Counting(Regression):
        backwards = 0

        def on_after_backward(self):
            self.backwards += 1

    calls = []
    module = Counting(adam)
    module.network[0].weight.register_hook(lambda gradient: calls.append(None))
    fit(module, make_loader())
    assert module.backwards == len(calls) == 12


class OrdinaryOutput(Regression):
    """Returns what an ordinary LightningModule may return."""

    extras = False

    def training_step(self, batch, batch_idx):
        loss = total(three_losses(self.network, batch))
        return {"loss": loss, "extra": loss.detach() * 2, "note": "kept"} if self.extras else loss


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_tensor_or_a_dict_with_loss_trains_as_in_every_lightning_module(extras, accumulate):
    module, plain, recorder = OrdinaryOutput(adam), SumRegression(adam), Recorder()
    module.extras = extras
    fit(module, make_loader(), accumulate_grad_batches=accumulate, callbacks=[recorder])
    fit(plain, make_loader(), accumulate_grad_batches=accumulate)
    assert_same(module.network, plain.network)
    assert set(recorder.outputs[0]) == ({"loss", "extra", "note"} if extras else {"loss"})


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_mtadam_on_a_single_loss_equals_adam(extras, accumulate):
    module, plain, recorder = OrdinaryOutput(), SumRegression(adam), Recorder()
    module.extras = extras
    trainer = fit(module, make_loader(), accumulate_grad_batches=accumulate, callbacks=[recorder])
    fit(plain, make_loader(), accumulate_grad_batches=accumulate)
    assert largest_difference(module.network, plain.network) < 1e-12
    assert trainer.optimizers[0].terms == ("loss",)
    assert set(recorder.outputs[0]) == ({"loss", "extra", "note"} if extras else {"loss"})


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize(
    ("make_optimizer", "set_to_none"),
    # Not (adam, False): where p.grad is zero, Adam takes a step with its old moments.
    [(make_mtadam, True), (make_mtadam, False), (adam, True)],
)
def test_a_training_step_that_returns_none_skips_the_step(make_optimizer, set_to_none):
    class Skipping(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=set_to_none)

    module = Skipping(make_optimizer)
    fit(module, make_loader())
    batches = [batch for index, batch in enumerate(make_loader()) if index not in (0, 3)]
    assert_same(module.network, by_hand(make_optimizer, batches=batches)[0])


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_skipped_batch_drops_out_of_its_accumulated_group():
    class Skipping(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = Skipping()
    fit(module, make_loader(), accumulate_grad_batches=2)
    network = make_network()
    optimizer = make_mtadam(network)
    for batch in [*list(make_loader())[::2]] * 2:
        take_step(optimizer, {name: loss / 2 for name, loss in three_losses(network, batch).items()})
    assert_same(module.network, network)
