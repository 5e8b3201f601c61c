"""Train one neural network across a crowd of unequal devices that come and go."""
