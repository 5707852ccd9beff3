"""Probes: features -> predictions."""
