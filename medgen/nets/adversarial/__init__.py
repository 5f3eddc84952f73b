"""Generators and critics by architecture."""
