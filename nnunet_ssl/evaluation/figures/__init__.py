"""Figures of what the rest of the package measures; nothing is computed here that a table would need."""
