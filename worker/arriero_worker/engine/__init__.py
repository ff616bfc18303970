"""The engine on the leader: queue, scheduler, KV blocks, and the loop schedule -> run -> commit."""
