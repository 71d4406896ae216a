"""Handwriting, the plain Lightning way."""
