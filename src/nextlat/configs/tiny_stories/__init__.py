"""TinyStories at several scales."""
