"""FineWeb-Edu at several scales."""
