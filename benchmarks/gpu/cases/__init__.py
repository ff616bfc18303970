"""One module per operation, each with its CASES."""
