"""Flow matching: networks that predict velocities, and samplers over any velocity."""
