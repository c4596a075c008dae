"""What the process runs on: device, seeds, threads, distributed context, interruption, progress."""
