"""What calibration rows say about layers: moments of their inputs, and what errors of their outputs cost the model."""
