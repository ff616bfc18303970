"""The operator: what is observed of a LlamaDeployment becomes what is wanted, as pure functions."""
