"""The dataset on disk: preparing it in stages, reading it back, and feeding it to a training loop."""
