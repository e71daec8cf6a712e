"""A labelled corpus spoken by espeak-ng, for a machine with nothing on it."""
