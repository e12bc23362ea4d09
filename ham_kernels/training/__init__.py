"""The training loop and its state: epochs, phases, updates, the weight average, what they report."""
