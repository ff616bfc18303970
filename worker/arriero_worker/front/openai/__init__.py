"""The OpenAI HTTP API: request schemas and response shapes, over the request core."""
