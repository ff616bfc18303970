"""The public faces of a replica (OpenAI HTTP and gRPC), in a process of their own beside the engine."""
