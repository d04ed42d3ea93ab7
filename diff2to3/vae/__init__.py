"""The autoencoders: voxel features to latents to Gaussians, and occupancy grids to latents and back."""
