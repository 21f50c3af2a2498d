"""What any program needs: checks of arguments, files, digests, random numbers, signals, lines and bars on a screen.

Knows nothing of networks, images or devices. Imports `errors` alone.
"""
