"""A group of ranks: membership and epochs over gRPC, tensors over torch.distributed and shared memory."""
