"""What the library hands back, with its tables and pictures.

May import `features`, `saving` and what lies below them.
"""
