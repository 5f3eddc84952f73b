"""Where people would rather look than read."""
