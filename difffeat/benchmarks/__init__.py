"""Measured claims: every speed figure comes from here."""
