"""The network: pretrained weights, backbone, head, what is frozen, export. May import `data` and what lies below it."""
