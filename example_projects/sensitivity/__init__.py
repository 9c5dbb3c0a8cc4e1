"""How much each method's result depends on the weights the losses come with, and on the learning rate."""
