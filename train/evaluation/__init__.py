"""Validation, calibration and result files."""
