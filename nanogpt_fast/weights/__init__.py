"""Other people's weights: each format in and out through one canonical form."""
