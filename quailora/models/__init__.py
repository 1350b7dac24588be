"""Hugging Face models: loading them, finding their linear layers, watching their inputs."""
