"""The router: picks a replica for each request, holds what cannot be served yet, replays what broke."""
