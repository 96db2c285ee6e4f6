"""The four networks of HI-Diff."""
