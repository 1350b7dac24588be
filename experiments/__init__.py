"""What a better start is worth after training: the reference experiment, and what draws its tables.

`python -m experiments --help` lists the commands. docs/worth.md explains what was measured and what came out.
"""
