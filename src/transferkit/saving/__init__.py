"""Models and optimizers as plain types and tensors in a file, verified when they are read.

May import `model` and what lies below it.
"""
