"""What callbacks of the trainer see."""

import lightning.pytorch as pl


class Recorder(pl.Callback):
    """Keeps copies of what the hooks see."""

    def __init__(self):
        self.outputs, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(tuple(p.grad.clone() for p in pl_module.network.parameters()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(outputs)
