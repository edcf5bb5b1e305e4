"""The data library: sources, images, captions, noun statistics, encoders, feature shards. Knows nothing of Ray."""
