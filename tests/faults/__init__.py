"""Faults, each injected for real."""
