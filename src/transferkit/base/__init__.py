"""What any program needs. Knows nothing of networks, images or devices, and imports `errors` alone."""
