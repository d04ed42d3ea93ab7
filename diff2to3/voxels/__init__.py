"""Meshes and views in, features on active voxels out: voxelisation, image encoders, aggregation over
views."""
