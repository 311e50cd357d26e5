"""Make a version of a trained run: quantise, calibrate, export."""
