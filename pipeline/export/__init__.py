"""A run as one file, ONNX or torch.export, with the proof that it gives what the run gave; and the run's card."""
