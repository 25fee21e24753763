"""Helpers for all other folders; they import only torch, numpy and the standard library."""
