"""Measurements; `make bench` runs them all. Ratios come from one run on one machine, as medians."""
