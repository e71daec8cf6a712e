"""The networks: one class of network a file."""
