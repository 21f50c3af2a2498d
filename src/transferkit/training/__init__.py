"""From batches to weights: the loss, the step, the epochs, and what watches them.

May import all other folders.
"""
