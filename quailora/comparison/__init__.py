"""Methods side by side on the same calibration data."""
