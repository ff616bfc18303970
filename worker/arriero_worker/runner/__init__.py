"""What every rank does with a step plan: build the batch, run the model, sample."""
