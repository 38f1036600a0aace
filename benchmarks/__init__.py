"""Measurements of speed, size and accuracy; `make bench` runs them all. Not part of the wheel."""
