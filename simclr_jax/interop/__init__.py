"""Import and export of weights, one file per format."""
