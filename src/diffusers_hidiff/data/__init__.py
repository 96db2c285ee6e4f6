"""Pairs of blurry and sharp images: from two folders, or synthesised from sharp ones."""
