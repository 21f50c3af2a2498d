"""What features and probabilities tell about the images themselves.

Pure functions of features, probabilities and weights, a file each.
"""
