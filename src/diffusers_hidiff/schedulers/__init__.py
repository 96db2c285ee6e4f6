"""The noise schedule of HI-Diff and its reverse step."""
