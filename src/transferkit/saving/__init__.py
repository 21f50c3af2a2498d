"""Models and optimizers as plain types and tensors in a verified file. May import `model` and what lies below it."""
