"""What a training will need, before it is started: memory, time, communication."""
