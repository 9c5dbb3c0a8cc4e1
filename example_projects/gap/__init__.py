"""How far MTAdam stays behind Adam with good weights, each at its own best learning rate, and with what setting."""
