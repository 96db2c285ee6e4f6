"""Pairs of blurry and sharp images: from folders, or synthesised from sharp ones."""
