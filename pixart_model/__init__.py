"""The slim training package: the PixArt transformer, its diffusion, and training from feature shards."""
