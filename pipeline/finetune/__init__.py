"""Backbone and head trained together: parameter groups, augmentation, the loop, checkpoints."""
