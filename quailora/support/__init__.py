"""What every part of the package uses: files, settings, processes, memory, progress and tables."""
