"""Where computation runs and what can go wrong there: precision, memory, infinite and NaN values. May import `base`."""
