"""Scan folders to samples, remember their digests, split them, and decode images to RGB."""
