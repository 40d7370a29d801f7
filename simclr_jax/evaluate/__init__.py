"""Measurements of a frozen encoder, one file per protocol."""
