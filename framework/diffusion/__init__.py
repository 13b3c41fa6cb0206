"""Diffusion pipelines: their checkpoints and how they are run."""
