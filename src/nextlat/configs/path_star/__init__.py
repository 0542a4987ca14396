"""Path-Star at several scales."""
