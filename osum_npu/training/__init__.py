"""Training in stages: what learns, how fast, and what is written down on the way."""
