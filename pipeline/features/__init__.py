"""Pooled features: what determines them (spec), where they are kept (store), how they are computed (extractor)."""
