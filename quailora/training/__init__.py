"""What helps while an adapter is trained, and after its training."""
