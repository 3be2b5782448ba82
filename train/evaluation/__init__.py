"""Validation, calibration, result files, and how sure a score is."""
