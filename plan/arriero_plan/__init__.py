"""Pure arithmetic: model shapes, memory, parallel plan, spec schema, launch file. No I/O, no torch."""
