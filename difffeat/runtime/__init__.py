"""Samples through an engine into a store, and the store itself. Needs no torch."""
