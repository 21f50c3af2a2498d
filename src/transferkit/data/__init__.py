"""From what a user passes as data to batches of model input on the device. May import `compute` and what lies below."""
