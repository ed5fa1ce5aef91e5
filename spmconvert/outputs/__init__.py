"""What a model puts out, and how two models' outputs are compared."""
