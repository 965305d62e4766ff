"""What others' users would run for the same work: their own models, losses and optimizers, each in a module of its own."""
