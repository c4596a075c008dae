"""The composition root: one short function a stage, made of the parts below."""
