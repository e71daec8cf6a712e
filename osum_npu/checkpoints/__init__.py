"""Model directories, and weights that others published."""
