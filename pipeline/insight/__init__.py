"""What the features say of the images: neighbours, near-duplicates, doubted labels, outliers, what to label next."""
