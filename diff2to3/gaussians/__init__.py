"""Gaussians as files and pictures."""
