"""Cached decoding of action tokens, with the trained modules or with a frozen copy of them."""
