"""A model in motion: text, windows of tokens, and a walk through the blocks that collects statistics of inputs."""
