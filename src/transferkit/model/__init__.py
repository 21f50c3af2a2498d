"""The network: pretrained weights, backbone, head, what of it is frozen, and how it leaves for other programs.

May import `data` and what lies below it.
"""
