"""Cached decoding of action tokens, by the trained modules or by a frozen copy."""
