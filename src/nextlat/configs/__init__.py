"""Configurations that ship with the library."""
