"""What the frozen layers make of each image, computed once and cached.

May import `model` and what lies below it.
"""
