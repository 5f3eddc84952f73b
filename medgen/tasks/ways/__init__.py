"""Ways to make scans that a dataset does not have: from noise, or of somebody's scan."""
