"""What a method is: its parts, the published ones by name, and distillation."""
