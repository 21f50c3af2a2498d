"""Where the arithmetic runs and what can go wrong there: devices, precision, memory, numbers that are not finite.

May import `base`.
"""
