"""What the router tells of itself: metrics, access log, spans."""
