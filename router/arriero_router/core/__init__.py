"""What the router decides, as plain state machines: no sockets, no clock but the one handed in."""
